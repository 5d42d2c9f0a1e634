"""What hypothesis makes of good input to break it: records, configurations, checkpoint folders. Not a test module."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

GOOD: dict[str, list[dict[str, Any]]] = {
    "demonstration": [
        {"prompt": "p", "response": "r"},
        {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "r"}]},
        {"conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "r"}], "system": "s"},
        {
            "messages": [
                {"role": "user", "content": "p"},
                {"role": "assistant", "content": "look", "reasoning": "", "tool_calls": None, "weight": 0},
                {"role": "tool", "content": "t", "tool_call_id": "c", "name": "f"},
                {"role": "assistant", "content": "r", "weight": 1},
            ],
            "tools": [],
        },
    ],
    "preference": [
        {"prompt": "p", "chosen": "a", "rejected": "b", "weight": 0.5},
        {"chosen": "\n\nHuman: q\n\nAssistant: yes", "rejected": "\n\nHuman: q\n\nAssistant: no"},
        {
            "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "no"}],
        },
    ],
    "ranking": [
        {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [2, 1, 3]},
        {"prompt": [{"role": "user", "content": "p"}], "responses": ["a", "b"], "scores": [0.5, -1]},
    ],
    "unpaired": [
        {"prompt": "p", "response": "r", "label": True},
        {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "r"}], "label": "bad"},
    ],
    "trajectory": [
        {"prompt": "p", "steps": ["a", {"text": "b", "reward": 1, "logprobs": [-0.5, -1]}], "reward": 0.5},
        {"prompt": "p", "trajectories": [{"steps": ["a"], "reward": 1}, {"response": "b", "reward": 0}]},
        {
            "messages": [
                {"role": "user", "content": "p"},
                {"role": "assistant", "content": "look", "reward": 0.1, "logprob": -2},
                {"role": "tool", "content": "seen"},
                {"role": "assistant", "content": "done"},
            ],
            "reward": 1.0,
        },
        {"prompt": "p", "steps": ["a", "b"], "step_rewards": [0, 1], "step_logprobs": [-1, None]},
    ],
}
"""Records of each kind, in some of their layouts."""

NUMBERS = st.sampled_from([0, -1, 1e39, -1e39, 1e308, -1e308, 5e-324, 2**63, 10**400, float("nan"), float("inf")])
TEXTS = st.one_of(
    st.sampled_from(["", " ", "\n", "\0", "\ud800", "<|im_end|>", "<|im_start|>", "{{ 1/0 }}", "../../x", "x" * 3000]),
    st.text(max_size=5),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values inside of a value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(place for key, content in inner for place in places(content, (*here, key)))]


def changed(draw: st.DrawFn, value: Any) -> Any:
    """A copy of `value` with a value inside replaced, removed, doubled or renamed."""
    copy = json.loads(json.dumps(value))
    *path, last = draw(st.sampled_from([place for place in places(copy) if place]))
    holder = copy
    for key in path:
        holder = holder[key]
    way = draw(st.sampled_from(["replace", "replace", "replace", "remove", "wrap", "rename"]))
    if way == "replace":
        holder[last] = draw(JUNK)
    elif way == "remove":
        del holder[last]
    elif way == "wrap":
        holder[last] = draw(st.sampled_from([[holder[last]], {"x": holder[last]}, [holder[last]] * 2]))
    elif isinstance(holder, dict):
        holder[draw(TEXTS)] = holder.pop(last)
    return copy


@st.composite
def broken_record(draw: st.DrawFn, kind: str) -> Any:
    """A record with one to three faults; now and then it is still good."""
    value = draw(st.sampled_from(GOOD[kind]))
    for _ in range(draw(st.integers(1, 3))):
        if not isinstance(value, dict | list) or len(places(value)) < 2:
            break
        value = changed(draw, value)
    return value


@st.composite
def broken_bytes(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes with some cut out, changed, or put in."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        way = draw(st.sampled_from(["cut", "change", "insert", "truncate"]))
        if way == "cut":
            del content[start : start + draw(st.integers(1, 8))]
        elif way == "truncate":
            del content[start:]
        else:
            stop = start + draw(st.integers(1, 4)) if way == "change" else start
            content[start:stop] = draw(st.binary(min_size=1, max_size=4))
    return bytes(content)


@st.composite
def broken_line(draw: st.DrawFn, kind: str) -> bytes:
    """A line of a jsonl file that is probably not a good record; never a blank one."""
    value = draw(broken_record(kind))
    line = json.dumps(value, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    if draw(st.booleans()):
        line = draw(broken_bytes(line))
    line = line.replace(b"\n", b"").replace(b"\r", b"")
    return line if line.strip() else b"?"


def files(folder: Path) -> list[Path]:
    """All files of a folder, in a fixed order."""
    return sorted(path for path in folder.rglob("*") if path.is_file())
