"""Ray's workers on one's own machine as forks of a process that has imported what they need: they start in milliseconds.

    server = ForkServer(environment)        imports begin, beside whatever this process does next
    ray.init(runtime_env={"py_executable": server.python})

Ray starts five Python processes for one training worker, each of which would spend seconds of CPU on importing torch, Ray Train,
transformers and DeepSpeed. `py_executable`, a setting of Ray, names the program that runs a worker's script: here `fork_client`,
which asks the server (`fork_server`).

Left out: clusters, whose nodes start their workers; GPUs (`cluster` decides).
"""

from __future__ import annotations

import atexit
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.fork_server import JOB_MODULES, MODULES, listen

WITHOUT_GPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
"""DeepSpeed looks for GPUs while it is imported, and no fork could use one that this process has touched."""


class ForkServer:
    """The server, for the process that started it: with this process it ends too, as soon as the last worker has ended.

    Args:
        environment: variables that the modules read while they are imported; what a user has set comes first.
        modules: what is imported at once.
        job_modules: what is imported as soon as a job has its first worker.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        modules: Sequence[str] = MODULES,
        job_modules: Sequence[str] = JOB_MODULES,
    ) -> None:
        self._address = str(Path(tempfile.mkdtemp(prefix="qalign-"), "fork"))
        root = str(Path(__file__).parents[1])
        program = (
            f"import sys; sys.path.insert(0, {root!r}); from pipeline.fork_server import main; main(*sys.argv[1:])"
        )
        with listen(self._address) as listener:
            told = [self._address, str(listener.fileno()), ",".join(modules), ",".join(job_modules)]
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", program, *told],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,  # libraries greet while they are imported
                pass_fds=[listener.fileno()],
                start_new_session=True,  # Ctrl-C is for the parent to handle
                env=dict(environment) | os.environ | WITHOUT_GPU,
            )
        atexit.register(self._end)

    @property
    def python(self) -> str:
        """For Ray's `py_executable`: the words of a command."""
        return shlex.join([sys.executable, "-I", "-S", str(Path(__file__).with_name("fork_client.py")), self._address])

    def close(self) -> None:
        """No more workers. Those that are there live on."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def _end(self) -> None:
        """At our end: imports that nobody waits for any more end with us."""
        self._process.terminate()
        shutil.rmtree(Path(self._address).parent, ignore_errors=True)
