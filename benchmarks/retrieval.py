"""Everything about finding adapters: python -m benchmarks.retrieval [--rows id,...] [--quick] [options of the parts].

    weights   benchmarks.retrieval_weights   --zoo FOLDER    what the weight encoder finds (a GPU, or patience)
    encode    benchmarks.retrieval_encode                    one FLUX-size adapter on a CPU
    index     benchmarks.retrieval_index                     a million vectors on two cores
    hybrid    benchmarks.retrieval_hybrid    --zoo FOLDER    cards, previews and weights together

Only the parts that hold the rows asked for are run; those that need a zoo are left out where none is given.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

PARTS = {  # module, and whether it needs a zoo
    "benchmarks.retrieval_encode": False,
    "benchmarks.retrieval_index": False,
    "benchmarks.retrieval_weights": True,
    "benchmarks.retrieval_hybrid": True,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", help="ids, comma-separated")
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing recorded")
    parser.add_argument("--zoo", help="from python -m benchmarks.zoo")
    args, others = parser.parse_known_args(argv)
    for name, needs_zoo in PARTS.items():
        if needs_zoo and args.zoo is None:
            print(f"{name}: left out, give it --zoo FOLDER", flush=True)
            continue
        module = importlib.import_module(name)
        wanted = [row for row in (args.rows or "").split(",") if row in module.IDS]
        if args.rows and not wanted:
            continue
        given = ["--rows", ",".join(wanted)] if wanted else []
        given += ["--quick"] if args.quick else []
        module.main([*given, *(["--zoo", args.zoo] if needs_zoo else []), *others])


if __name__ == "__main__":
    main()
