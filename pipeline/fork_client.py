"""Stands in for `python` where Ray starts a worker: has a `fork_server` fork it, waits until it ends, and ends as it did.

Started as `python -I -S fork_client.py SOCKET SCRIPT ARGUMENTS…`. It imports next to nothing: it is there to be quick. Where no
server answers, it becomes the ordinary Python that it stands in for.
"""

import contextlib
import json
import os
import resource
import signal
import socket
import sys


def ask(address: str, arguments: list[str]) -> tuple[str, str]:
    """What a server answers: "forked" and how the worker ended, or the socket of another server to ask. Empty: nothing."""
    request = {
        "arguments": arguments,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }
    body = json.dumps(request).encode()
    first = last = ""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server, contextlib.suppress(OSError):
        server.connect(address)
        socket.send_fds(server, [len(body).to_bytes(8, "big")], [0, 1, 2])
        server.sendall(body)
        answers = server.makefile()
        first, last = answers.readline(), answers.readline()
    return first.strip(), last.strip()


def main(address: str, arguments: list[str]) -> int:
    """The status to end with."""
    answer, ended = ask(address, arguments)
    if answer not in ("", "forked"):
        answer, ended = ask(answer, arguments)
    if not answer:
        os.execv(sys.executable, [sys.executable, *arguments])  # noqa: S606  (no shell is what we want)
    if not ended:  # the server was killed; what becomes of the worker is between Ray and the worker
        return 1
    status = os.waitstatus_to_exitcode(int(ended))
    if status < 0:
        if status != -signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
