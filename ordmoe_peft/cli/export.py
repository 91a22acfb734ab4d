"""`ordmoe export ADAPTER --output_dir DIR --to FORM`: an OrdMoE adapter as a LoRA adapter that other software loads."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from peft import PeftModel

from ..adapter.saved import SavedAdapter
from ..errors import OrdMoEConfigError
from ..tools.base_on_meta import base_name, base_on_meta
from ..tools.export.folder import check_export_folder
from ..tools.export.plain_peft import export_plain_lora, subfolder_of
from ..tools.export.routing_change import PROBE_TEXTS, RoutingChange, measure_routing_change
from ..tools.export.servers import FORMATS, served
from ..tools.export.serving import ROUTER_CHOICES, ServingOptions, export_for_server
from .arguments import IGNORE_FINGERPRINT, ModelArguments
from .loading import load_base, load_processing_class
from .parser import ADAPTER, CommandParser
from .tables import print_table


FORMS = ("peft", *FORMATS)
LLAMA_CPP = (
    "For llama.cpp: `ordmoe merge ADAPTER --output_dir DIR`, then llama.cpp's own `python convert_hf_to_gguf.py DIR`."
)


@dataclass(kw_only=True)
class ExportArguments(ModelArguments):
    """What to export, and to what. The options of the base are for `--router drop`, which runs it."""

    model_name_or_path: str = field(
        default="",
        metadata={
            "help": "Folder or hub id of the base; the one that the adapter names by default.",
            "aliases": ["--base"],
        },
    )
    adapter: str = field(metadata={"help": "Folder or hub id of the OrdMoE adapter."})
    adapter_name: str | None = field(
        default=None, metadata={"help": "Which adapter of the folder, where it holds several; `default` by default."}
    )
    output_dir: str = field(metadata={"help": "Folder to write to: not there yet, or an earlier export, which goes."})
    to: str = field(
        default="peft",
        metadata={"help": "peft, or a server's form: vllm-3d, vllm-2d, sglang.", "choices": list(FORMS)},
    )
    router: str | None = field(
        default=None,
        metadata={
            "help": "LoRA on routers: keep it, fold it into a file of patched routers, or drop it and print what that "
            "changes. A server that takes none needs a choice.",
            "choices": list(ROUTER_CHOICES),
        },
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes with the base."})
    ignore_fingerprint: bool = field(default=False, metadata={"help": IGNORE_FINGERPRINT})


def build_parser() -> CommandParser:
    return CommandParser(
        "export",
        (ExportArguments,),
        ADAPTER,
        needed="--output_dir DIR",
        description="Write an OrdMoE adapter as a LoRA adapter for plain PEFT or an inference server.",
        epilog=LLAMA_CPP,
    )


def main(arguments: Sequence[str]) -> None:
    (options,) = build_parser().parse_args_and_config(arguments)
    check_export_folder(options.output_dir)
    if options.to == "peft":
        if options.router not in (None, "keep"):
            raise OrdMoEConfigError(f"router={options.router!r} is for servers: plain PEFT takes LoRA on routers.")
        export_plain_lora(options.adapter, options.output_dir, options.adapter_name, options.model_name_or_path or None)
        print(f"Plain LoRA adapter in {options.output_dir}")
        return
    serving = ServingOptions(
        options.to,
        options.router,
        options.adapter_name,
        options.model_name_or_path or None,
        options.model_revision,
        options.trust_remote_code,
        options.ignore_fingerprint,
    )
    if options.router == "drop":
        saved = SavedAdapter.read(options.adapter, subfolder_of(Path(options.adapter), options.adapter_name))
        bare = base_on_meta(saved, serving.base, serving.revision, serving.trust_remote_code)
        served(type(bare).__name__, options.to)  # before the base runs, which may take long
        if "router" in saved.settings["targets"]:
            print_change(change_without_router(saved, options))
    written = export_for_server(options.adapter, options.output_dir, serving)
    print_table(
        f"{options.adapter} for {options.to}",
        ("rank", "experts", "linear layers", "routers", "routers folded", "routers dropped"),
        [tuple(str(value) for value in vars(written).values())],
    )
    print(
        f"Adapter for {options.to} in {options.output_dir}. No server has run with it: its README.md says what to "
        "check."
    )


def change_without_router(saved: SavedAdapter, options: ExportArguments) -> RoutingChange:
    """Run the base with the adapter on the probes that are saved with it, or on a few sentences."""
    options.model_name_or_path = options.model_name_or_path or base_name(saved)
    if not options.model_name_or_path:
        raise OrdMoEConfigError(
            f"{saved.folder} does not name its base: give `ordmoe export ADAPTER MODEL`, since --router drop runs it."
        )
    base = load_base(options, options.trust_remote_code)
    model = PeftModel.from_pretrained(base, saved.folder, ignore_fingerprint=options.ignore_fingerprint)
    token_ids = ((saved.record or {}).get("probes") or {}).get("token_ids")
    if not token_ids:
        tokenizer = load_processing_class(options, options.trust_remote_code)
        token_ids = [getattr(tokenizer, "tokenizer", tokenizer)(text)["input_ids"] for text in PROBE_TEXTS]
    return measure_routing_change(model, token_ids)


def print_change(change: RoutingChange) -> None:
    rows = [(name, f"{overlap:.3f}", f"{kl:.4f}") for name, overlap, kl in change.layers]
    overlap, kl = change.mean
    print_table(
        f"Routing without LoRA on routers, {change.num_tokens} tokens",
        ("layer", "share of the K experts that stay", "KL, nats"),
        [*rows, ("mean", f"{overlap:.3f}", f"{kl:.4f}")],
    )
    for name, reason in change.unmeasured.items():
        print(f"{name}: not measured: {reason}")
