"""Ship the two adapters that `make demo` trains, with what it measured in their records and cards.

    make demo
    python adapters/make.py

An adapter's folder gets the files of `outputs/demo`, and nothing else of a run: its weights and configuration as they
are, its record with the figures on held-out questions, and a card written from these.
"""

import argparse
import json
import shutil
from pathlib import Path
from statistics import fmean

from ordmoe_peft.adapter.card_file import write_saved_card
from ordmoe_peft.adapter.record import write_record
from ordmoe_peft.files import whole_files


HERE = Path(__file__).parent
BASE = "examples/easy_vqa/base"
DATA = "easy-VQA"
IN_TESTS = 4  # every so many questions are asked again in tests/test_shipped_adapters.py


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("outputs/demo"), help="folder that the demo left")
    demo = parser.parse_args().demo
    base = evaluation("base", demo / "base_results.json")
    for name in ("sft", "ordmoe"):
        folder = HERE / f"easy-vqa-{name}"
        results = demo / f"{name}_results.json"
        evaluations = [base, evaluation("adapter", results), evaluation("adapter", results, every=IN_TESTS)]
        ship(demo / name, folder, evaluations)
        print(
            f"{folder.name}: "
            + ", ".join(f"{path.name} {path.stat().st_size:,} B" for path in sorted(folder.iterdir()))
        )


def ship(trained: Path, folder: Path, evaluations: list[dict]) -> None:
    """Write the adapter in the folder `trained` to `folder`, its record with `evaluations`."""
    record = json.loads((trained / "ordmoe.json").read_text())
    training = record["training"] | {"evaluations": evaluations}
    training["data"] = {**training["data"], "name": DATA}
    with whole_files(folder) as unfinished:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(trained / name, unfinished / name)
        write_record(unfinished, record["base"] | {"name": BASE}, training, record["probes"])
    write_saved_card(folder)


def evaluation(subject: str, results: Path, every: int = 1) -> dict:
    """What `ordmoe evaluate` found of all tiers, as records have it; of every so many of the questions."""
    tiers = json.loads(results.read_text())
    right = tiers[0]["items"]["is_right"][::every]
    kinds = {} if every > 1 else {f"accuracy/{kind}": share for kind, share in tiers[0]["accuracy"].items()}
    kinds.pop("accuracy/overall", None)
    likelihoods = {
        f"tier_{result['tier']}/log_likelihood": fmean(result["items"]["log_likelihood"][::every]) for result in tiers
    }
    return {
        "of": subject,
        "data": DATA,
        "split": "test",
        "rows": len(right),
        "part": f"every {every}th of these" if every > 1 else "drawn by seed 0",
        "metrics": {"accuracy": fmean(right), **kinds, **likelihoods},
    }


if __name__ == "__main__":
    main()
