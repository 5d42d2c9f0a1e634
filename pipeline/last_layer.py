"""The last layer, where somebody reads what comes of it: at the states that predict trained tokens.

Nothing looks at a prompt's last hidden states, except for the one that predicts the responses' first tokens. All layers before
need them, and so do the keys and values of the last one; its queries do not (`attention` asks here), nor its feed-forward block,
because both treat each position alone.

Left out: what is read (`trunk`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

_READ: ContextVar[tuple[Tensor, int] | None] = ContextVar("read", default=None)
"""The places that are read, and how many there are."""
_ENDS: ContextVar[bool] = ContextVar("ends", default=False)
"""Whether no prompt is read before its last token."""


def attach(lm: nn.Module) -> None:
    """Make a language model's last feed-forward block skip what nobody reads; models that have none by that name stay as they are."""
    block = getattr(_last_layer(lm), "mlp", None)
    if block is not None and _select not in block._forward_pre_hooks.values():
        block.register_forward_pre_hook(_select)
        block.register_forward_hook(_spread)


@contextmanager
def read_at(lm: nn.Module, places: Tensor, tokens: int, ends: bool) -> Iterator[None]:
    """In a forward of flat rows [1, tokens, …] only the states at `places` [n] are read, which may repeat.

    ends: none of them lies in a prompt before its last token. Nothing is left out where layers are computed again in the backward
    pass: by then nobody would know.
    """
    again = any(getattr(module, "gradient_checkpointing", False) for module in lm.modules())
    tokens_of = _READ.set(None if again else (places.unique(), tokens)), _ENDS.set(ends and not again)
    try:
        yield
    finally:
        _READ.reset(tokens_of[0])
        _ENDS.reset(tokens_of[1])


def reads_ends(attention: nn.Module) -> bool:
    """Whether of what this attention finds for prompts only their last tokens' part is read."""
    index, config = getattr(attention, "layer_idx", None), getattr(attention, "config", None)
    return _ENDS.get() and index is not None and index + 1 == getattr(config, "num_hidden_layers", None)


def _last_layer(lm: nn.Module) -> nn.Module | None:
    for name in ("layers", "h"):
        layers = getattr(lm.base_model, name, None)
        if isinstance(layers, nn.ModuleList) and len(layers):
            return layers[-1]
    return None


def _select(block: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor] | None:
    read = _READ.get()
    return None if read is None or len(args) != 1 else (args[0].index_select(1, read[0]),)


def _spread(block: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
    """Zeros at the other places: what is added to the residual stream there is never looked at."""
    read = _READ.get()
    if read is None or len(args) != 1:
        return None
    places, tokens = read
    found, *more = out if isinstance(out, tuple) else (out,)  # experts tell what was chosen as well
    found = found.new_zeros(1, tokens, found.shape[-1]).index_copy(
        1, places, found.view(1, len(places), found.shape[-1])
    )
    return (found, *more) if isinstance(out, tuple) else found
