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

from ordmoe_peft.adapter.card_file import write_saved_card
from ordmoe_peft.adapter.record import write_record
from ordmoe_peft.files import whole_files


HERE = Path(__file__).parent
BASE = "examples/easy_vqa/base"
DATA = "easy-VQA"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("outputs/demo"), help="folder that the demo left")
    demo = parser.parse_args().demo
    base = evaluation("base", demo / "base_results.json")
    for name in ("sft", "ordmoe"):
        folder = HERE / f"easy-vqa-{name}"
        ship(demo / name, folder, [base, evaluation("adapter", demo / f"{name}_results.json")])
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


def evaluation(subject: str, results: Path) -> dict:
    """What `ordmoe evaluate` found of all tiers, as records have it."""
    tiers = json.loads(results.read_text())
    first = tiers[0]
    accuracy = {f"accuracy/{kind}": share for kind, share in first["accuracy"].items() if kind != "overall"}
    likelihoods = {f"tier_{result['tier']}/log_likelihood": result["log_likelihood"] for result in tiers}
    return {
        "of": subject,
        "data": DATA,
        "split": "test",
        "rows": first["samples"]["overall"],
        "metrics": {"accuracy": first["accuracy"]["overall"], **accuracy, **likelihoods},
    }


if __name__ == "__main__":
    main()
