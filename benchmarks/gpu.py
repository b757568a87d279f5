"""Everything that needs a GPU, in one command of at most eight minutes on one H100.

    python benchmarks/gpu.py --out gpu.jsonl [--peer FOLDER] [--parts agreement,ceilings,...]
    python benchmarks/gpu.py --tiny     rehearsal in a minute, on a CPU too

It needs torch and openpalm's core dependencies, and no network. Parts, smallest risk first; each
row is printed, and written to --out, as soon as it is known. A part has a share of --seconds and
what earlier parts leave of theirs; what would not fit is left out with a line, and what fails
prints its error and leaves the others their turn (exit 1 at the end):

agreement  logits, engine, trainer, optimizers, float16, moments in the CPU's memory, a resumed run,
           gradients also compiled: see gpu_checks.py
ceilings   best rates of an 8192 x 8192 x 8192 matrix product and of a copy on the device
decoding   tokens/s of the engine in bfloat16, and the share of the copy's rate that reading the
           weights and the cache once a step takes
training   tokens/s, share of the measured product's rate and peak memory of whole steps (forward,
           backward, clip, fused AdamW) in bfloat16 autocast, also compiled, with and without flash
           attention, also palm-rlhf-pytorch (--peer names a folder that its wheels are unpacked
           in); and the kernels that the GPU's time went to
memory     peak memory and time of other configurations
fsdp       FSDP2 on a mesh of one GPU, and on 2, 4, ... GPUs where there are
attention  time and memory of one layer's attention, each way that torch can be asked for it

Rows of training and memory also have what `openpalm plan` says of that configuration: plan_gb,
plan_ms, and their ratios to what was measured.

`mfu` is (6 N + 12 L h head_dim T) x tokens/s / ceiling as in the PaLM paper, appendix B: it counts
the whole square of attention. `mfu_causal` counts the half that is computed;
`mfu_of_published_peak` is the first over the maker's peak (an H100's: 989.4 TFLOP/s) instead.
"""

import argparse
import faulthandler
import sys
from pathlib import Path

import gpu_checks
import gpu_ranks
import gpu_rates
import gpu_training
import torch
from gpu_bench import SPARE_S, Bench, Part, measure, tell

ORDER = (
    Part("agreement", 100, gpu_checks.agreement),
    Part("ceilings", 10, gpu_rates.ceilings),
    Part("decoding", 55, gpu_rates.decoding),
    Part("training", 185, gpu_training.training),
    Part("memory", 50, gpu_training.memory_of_plan),
    Part("fsdp", 40, gpu_ranks.fsdp_part),
    Part("attention", 40, gpu_rates.attention),
)
PARTS = {part.name: part for part in ORDER}
PEER = Part("peer_training", 60, gpu_training.peer_training)
"""Run by the part `training`, in a process of its own."""


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="file that rows are appended to, JSON lines")
    parser.add_argument("--parts", default=",".join(PARTS), help="in this order")
    parser.add_argument("--models", default="palm-150m,palm-410m,palm-1b", help="that are trained")
    parser.add_argument("--peer", type=Path, help="folder that palm-rlhf-pytorch is installed in")
    parser.add_argument("--ceiling", type=float, default=0.0, help="FLOP/s, where known already")
    parser.add_argument("--seconds", type=float, default=480, help="for everything")
    parser.add_argument("--processes", type=int, help="most of the part fsdp; default: all GPUs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="rehearse with small shapes")
    how = parser.parse_args()
    known = PARTS | {PEER.name: PEER}
    wrong = [name for name in how.parts.split(",") if name not in known]
    if wrong:
        parser.error(f"--parts {wrong[0]}: not a part; take some of {','.join(PARTS)}")
    how.parts = [known[name] for name in how.parts.split(",")]
    wrong = [name for name in how.models.split(",") if name not in gpu_training.ROWS]
    if wrong:
        parser.error(f"--models {wrong[0]}: take some of {','.join(gpu_training.ROWS)}")
    return how


def main() -> int:
    how = parsed()
    # Where a kernel hangs no signal gets through; what is known by then is written.
    faulthandler.dump_traceback_later(how.seconds + SPARE_S, exit=True)
    if how.peer is not None:
        sys.path.append(str(how.peer))  # last: what the environment has itself stays first
    device = torch.device(how.device)
    models = how.models.split(",")
    processes = how.processes or max(1, torch.cuda.device_count() * (device.type == "cuda"))
    bench = Bench(device, how.tiny, how.peer, models, processes, matmul=how.ceiling)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    tell("machine", {"device": name, "torch": torch.__version__, "tiny": how.tiny}, how.out)
    return 0 if measure(bench, how.parts, how.seconds, how.out) else 1


if __name__ == "__main__":
    sys.exit(main())
