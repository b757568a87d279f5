"""Training compared with other projects: speed, memory, and the loss after equal minutes.

    python benchmarks/train.py speed [--rounds 5] [--rows PRESET:LENGTHxROWS:DTYPE,...]
    python benchmarks/train.py memory [--model palm-150m] [--length 8192] [--dtype float32]
    python benchmarks/train.py curves [--picture benchmarks/memory.svg]
    python benchmarks/train.py equal-minutes [--data PATH] [--minutes 1.5]

Run it in an environment that has the peers and OpenPaLM (pip install torch==2.13.0, then
transformers, palm-rlhf-pytorch==0.8.0 and this project); a peer that cannot be imported is left out
and named. Random weights. Progress goes to stderr, tables in Markdown to stdout, or --json.

speed          whole steps (forward, backward, clip, AdamW): medians of rounds in which every
               contender takes its turn, and the share of the matrix-multiply rate measured then.
memory         peak resident memory and time of a step, each in a fresh process, ours with each way
               to recompute and to cut the loss, compared with palm-rlhf-pytorch's flash attention.
curves         the same for ours against context and against size, compared with theory: one
               picture and a table. Both need Linux; a point that would not fit is left out.
equal-minutes  validation loss of ours after T minutes and of each peer after 2T: one order of one
               data set, batch, schedule and dtype, the peer with the best of several learning rates
               searched at T/2, ours with its defaults (the rate shown is AdamW's). Minutes are
               steps: how many fit is timed before, in turns, so that nobody suffers from what
               else the machine does.
"""

import argparse
import gc
import json
import os
import statistics
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from peers_train import PEERS, OpenPalm, Rules, built, flops_per_token
from train_common import DTYPES, Row, peaks_line, random_batch, say, sized, step_seconds, table
from train_memory import curves, curves_table, memory, memory_table, point
from train_minutes import equal_minutes, equal_minutes_table

from openpalm.base.device import keep_freed_memory
from openpalm.train.sizing.measure import matmul_flops


def speed(how: argparse.Namespace) -> list[Row]:
    """Tokens a second of everyone in every row, and the rates of matrix multiplication."""
    device, peaks, rows = torch.device(how.device), dict.fromkeys(DTYPES, 0.0), []
    for shape in how.rows.split(","):
        name, cut, dtype = shape.split(":")
        length, batch = map(int, cut.split("x"))
        rules = Rules(sized(name, length), getattr(torch, dtype), device)
        known = {"OpenPaLM": OpenPalm} | PEERS
        wanted = how.who.split(";") if how.who else list(known)
        known["OpenPaLM, compiled"] = partial(OpenPalm, compile=True)
        found = built({name: known[name] for name in wanted}, rules)
        rates: dict[str, list[float]] = {who: [] for who in found}
        for turn in range(how.rounds + 1):  # the first warms up
            for kind in DTYPES:
                peaks[kind] = max(peaks[kind], matmul_flops(device, getattr(torch, kind)))
            for who, contender in found.items():
                given = random_batch(rules.config.vocab_size, batch, length)
                # While others have their turn, an idle model's memory may be taken from it.
                seconds = step_seconds(contender, given, how.steps, device, unmeasured=2)
                rate = batch * length / seconds
                say(f"{shape} round {turn} of {how.rounds}  {who}: {rate:.0f} tokens/s")
                if turn:
                    rates[who].append(rate)
        rows += [
            {
                "shape": shape,
                "dtype": dtype,
                "who": who,
                "parameters": contender.parameters,
                "tokens_per_s": statistics.median(rates[who]),
                "least": min(rates[who]),
                "most": max(rates[who]),
                "flops_per_token": flops_per_token(contender, length),
            }
            for who, contender in found.items()
        ]
        del found, contender
        gc.collect()
    for row in rows:
        first = next(r for r in rows if r["shape"] == row["shape"])
        row["peak_flops"] = peaks[row["dtype"]]
        row["first_against_it"] = first["tokens_per_s"] / row["tokens_per_s"]
        row["share_of_peak"] = row["flops_per_token"] * row["tokens_per_s"] / peaks[row["dtype"]]
    return rows


def speed_table(rows: list[Row]) -> str:
    return peaks_line(rows) + table(
        ("shape", "who", "parameters", "tokens/s", "least to most", "share of peak", "against it"),
        [
            (
                row["shape"],
                row["who"],
                f"{row['parameters'] / 1e6:.1f}M",
                f"{row['tokens_per_s']:.0f}",
                f"{row['least']:.0f} to {row['most']:.0f}",
                f"{row['share_of_peak']:.0%}",
                f"{row['first_against_it']:.2f}",
            )
            for row in rows
        ],
    )


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="speed|memory|curves|...")

    def verb(run: Callable[..., list[Row]], shown: Callable[..., str]) -> argparse.ArgumentParser:
        added = verbs.add_parser(run.__name__.replace("_", "-"))
        added.set_defaults(run=run, shown=shown)
        added.add_argument("--json", action="store_true")
        return added

    of = verb(speed, speed_table)
    laptop, large = "palm-14m:512x8", "palm-150m:1024x1"
    default = f"{laptop}:float32,{laptop}:bfloat16,{large}:bfloat16"
    of.add_argument("--rows", default=default, help="PRESET:LENGTHxROWS:DTYPE, separated by commas")
    of.add_argument("--rounds", type=int, default=5)
    of.add_argument("--steps", type=int, default=2, help="of a turn")
    of.add_argument(
        "--who",
        default="",
        help="only these, with semicolons between; also 'OpenPaLM, compiled'",
    )
    of.add_argument("--device", default="cpu")
    of.add_argument(
        "--give-back",
        action="store_true",
        help="freed memory returns to the system, as by default; `openpalm train` keeps it",
    )

    of = verb(memory, memory_table)
    of.add_argument("--ways", default="none,none:1024,selective:1024,full:1024")
    of.add_argument("--rounds", type=int, default=1)
    of.add_argument("--model", default="palm-150m")
    of.add_argument("--length", type=int, default=8192)
    of.add_argument("--dtype", default="float32", choices=DTYPES)

    of = verb(point, str)
    of.add_argument("--way", default="none")
    of.add_argument("--model", default="palm-150m")
    of.add_argument("--length", type=int, default=8192)
    of.add_argument("--dtype", default="float32", choices=DTYPES)

    of = verb(curves, curves_table)
    of.add_argument(
        "--ways", default="none,selective:1024,full:1024", help="RECOMPUTE[:LOSS CHUNK], by commas"
    )
    of.add_argument("--model", default="palm-150m", help="preset; its context varies")
    of.add_argument("--lengths", default="1024,2048,4096,8192,16384")
    of.add_argument("--models", default="palm-5m,palm-14m,palm-32m,palm-150m,palm-410m")
    of.add_argument("--size-length", type=int, default=1024, help="context where the size varies")
    of.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    of.add_argument("--picture", type=Path, default=Path(__file__).with_name("memory.svg"))

    for name in ("memory", "point", "curves"):
        verbs.choices[name].add_argument(
            "--without-moments", action="store_true", help="SGD, which has no state, not AdamW"
        )
        verbs.choices[name].add_argument(
            "--keep-freed", action="store_true", help="memory.keep_freed of ours, whatever the way"
        )

    of = verb(equal_minutes, equal_minutes_table)
    of.add_argument("--data", default="builtin:python-docs", help="prepared, or text, or builtin")
    of.add_argument("--minutes", type=float, default=1.5, help="T")
    of.add_argument("--model", default="palm-5m")
    of.add_argument("--length", type=int, default=512)
    of.add_argument("--rows", type=int, default=8, help="sequences of a step")
    of.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    of.add_argument("--rates", default="5e-4,1e-3,2e-3,4e-3", help="a peer's, the best is taken")
    of.add_argument("--rounds", type=int, default=5, help="of timing")
    of.add_argument("--device", default="cpu")
    return parser.parse_args()


def main() -> None:
    how, load = parsed(), os.getloadavg()[0]
    warnings.filterwarnings("ignore")
    if how.verb == "equal-minutes" or (how.verb == "speed" and not how.give_back):
        keep_freed_memory()  # as a run does; it serves the peers too
    rows = how.run(how)
    if how.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{torch.get_num_threads()} threads, load {load:.2f} before\n")
    print(how.shown(rows))


if __name__ == "__main__":
    main()
