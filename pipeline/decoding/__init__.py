"""Decoding: from prompts to completions.

Each decoder is a function of the same signature (`contract`) in a file of its own; adding one is a file and a line here.
`stage` runs the sampling of evaluations, `pieces` that of `jobs.decode`: in this process or as Ray Data actors.
"""

from __future__ import annotations

from pipeline.decoding import args, beam, best_of_n, controlled, proxy, sampling, transfer_q, vote
from pipeline.decoding.contract import Decoder

DECODERS: dict[str, Decoder] = {
    "sampling": Decoder(sampling.sample, frozenset({"policy"}), logprobs_of="policy"),
    "beam": Decoder(beam.search, frozenset({"policy"}), logprobs_of="policy"),
    "best_of_n": Decoder(best_of_n.best_of_n, frozenset({"policy", "scorer"}), logprobs_of="policy"),
    "vote": Decoder(vote.vote, frozenset({"policy"}), logprobs_of="policy"),
    "args": Decoder(args.decode, frozenset({"reference", "scorer"})),
    "controlled": Decoder(controlled.decode, frozenset({"reference", "scorer"})),
    "transfer_q": Decoder(transfer_q.decode, frozenset({"reference", "baseline", "scorer"})),
    "proxy": Decoder(proxy.decode, frozenset({"policy", "reference", "base"})),
}
