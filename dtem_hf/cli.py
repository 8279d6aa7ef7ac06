"""The `dtem-hf` command.

    dtem-hf plan facebook/deit-small-patch16-224 --flops 0.5
    dtem-hf quickstart   # a laptop's CPU

Each command imports its modules when it runs, so that `dtem-hf --help` answers at once.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .configuration import CONFIG_NAME, MatchingConfig, MergeConfig
from .console import OneLineErrors, print_table, show_version
from .errors import EXTRAS, BadValue, need
from .programs import PROGRAMS


if TYPE_CHECKING:
    from transformers import PretrainedConfig

_SHOWN_RESULTS = 5


app = typer.Typer(
    name="dtem-hf",
    cls=OneLineErrors,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def options(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Merge tokens in Hugging Face vision transformers.

    \b
    Examples:
      dtem-hf plan facebook/deit-small-patch16-224 --flops 0.5
      dtem-hf train --help
    """


_R_HELP = next(f.metadata["help"] for f in fields(MatchingConfig) if f.name == "r")

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model's Hub id or local folder.")]
_METHODS = "|".join(sorted(MergeConfig._methods))
Method = Annotated[
    str | None,
    typer.Option(metavar=_METHODS, help="The method; left out, the one that the model was saved with, or dtem."),
]
Reduction = Annotated[str | None, typer.Option("--r", metavar="R", help=f"{_R_HELP.capitalize()}, as JSON.")]
Flops = Annotated[float | None, typer.Option(metavar="SHARE", help="Merge to this share of the multiply-adds.")]
Pixels = Annotated[int | None, typer.Option(metavar="PIXELS", help="Height and width; left out: the model's own.")]
Branch = Annotated[str | None, typer.Option(metavar="NAME", help="Commit to this branch; a missing branch is made.")]
Message = Annotated[str | None, typer.Option(metavar="TEXT", help="The message of the commit.")]
_MERGES = f"An adapter's folder or Hub id, or a {CONFIG_NAME}; several give several columns."
Merges = Annotated[list[str] | None, typer.Option(metavar="ADAPTER", help=_MERGES)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def plan(
    model: Model,
    method: Method = None,
    r: Reduction = None,
    flops: Flops = None,
    image_size: Pixels = None,
    as_json: AsJson = False,
) -> None:
    """Show tokens per layer and multiply-adds per image.

    Only the model's config is downloaded.

    \b
    Examples:
      dtem-hf plan facebook/deit-small-patch16-224 --method tome --r 13
      dtem-hf plan facebook/deit-small-patch16-224 --flops 0.5 --json
    """
    from .labels import reduction_label
    from .programs.arguments import read_config, read_reduction

    reduction = read_reduction(r, flops)
    config = read_config(model)
    merged = _without_weights(config, _merge_of(config, method))
    if reduction:
        merged.set_reduction(**reduction)
    merge_plan = merged.merge_plan(image_size)
    if as_json:
        found = {"model": model, "merge": merged.merge_config.to_dict(), **merge_plan.to_dict()}
        typer.echo(json.dumps(found, indent=2))
        return

    default = "" if method or r or flops or hasattr(config, "merge") else ": the default; --method and --r choose"
    tokens = [merge_plan.num_tokens, *merge_plan.tokens]
    layers = zip(tokens, merge_plan.reductions, tokens[1:], merge_plan.layer_multiply_adds, strict=False)
    rows = [(i, *layer[:-1], f"{layer[-1] / 1e6:.1f}") for i, layer in enumerate(layers)]
    typer.echo(
        f"{model} ({type(merged).__name__}), {merged.merge_config.method}, "
        f"{reduction_label(merged.merge_config.schedule)}{default}"
    )
    print_table(("layer", "tokens in", "r", "tokens out", "M multiply-adds"), rows)
    typer.echo(str(merge_plan).splitlines()[-1])


@app.command()
def info(
    adapter: Annotated[
        str,
        typer.Argument(
            metavar="ADAPTER", help="An adapter's folder, Hub id, or id@revision; a merged model's folder."
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Show an adapter's method, backbone, size and results, or how the model in a folder is merged.

    \b
    Examples:
      dtem-hf info runs/deit_tiny/adapter
      dtem-hf info user/dtem-deit-small@main --json
    """
    from .files import check_is_there
    from .hub.adapter import MergeAdapter
    from .hub.publishing import card_results
    from .hub.reading import recorded_merge
    from .hub.records import clean
    from .models.attach import UNSET
    from .programs.arguments import read_config

    check_is_there(adapter)
    if (merge := recorded_merge(adapter)) is not None:
        config = read_config(adapter)
        plan = _without_weights(config, UNSET).merge_plan()
        if as_json:
            typer.echo(json.dumps({"model": adapter, "merge": merge, "plan": plan.to_dict()}, indent=2))
            return
        typer.echo(f"{adapter}: a merged model ({', '.join(config.architectures or [config.model_type])})")
        print_table((), [(name, clean(value)) for name, value in merge.items() if value is not None])
        typer.echo(str(plan).splitlines()[-1])
        return
    loaded = MergeAdapter.from_reference(adapter)
    found: dict[str, Any] = {
        "adapter": adapter,
        "merge": {**loaded.config.to_dict(), "embed_dim": loaded.embed_dim},
        "backbone": asdict(loaded.backbone),
        "parameters": sum(tensor.numel() for tensor in loaded.tensors.values()),
        "size_bytes": sum(tensor.nbytes for tensor in loaded.tensors.values()),
        "results": card_results(adapter),
    }
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return

    named = {**found["merge"], **found["backbone"]}
    facts = [(name, clean(value)) for name, value in named.items() if value is not None]
    facts += [("parameters", f"{found['parameters']:,}"), ("size", f"{found['size_bytes']:,} bytes")]
    results = found["results"]
    facts += [(f"{result['dataset']}, {result['metric']}", result["value"]) for result in results[:_SHOWN_RESULTS]]
    more = f"{len(results) - _SHOWN_RESULTS} more with --json" if results else "not evaluated"
    facts += [("results", more)] if not 0 < len(results) <= _SHOWN_RESULTS else []
    typer.echo(adapter)
    print_table((), facts)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="An adapter's folder.")],
    repo_id: Annotated[
        str | None,
        typer.Argument(metavar="USER/REPO", help="The repository; a missing one is made. --dry-run needs none."),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make a private repository; a public one is refused.")
    ] = False,
    branch: Branch = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Propose the commit as a pull request.")] = False,
    commit_message: Message = None,
    overwrite_card: Annotated[bool, typer.Option("--overwrite-card", help="Replace a README.md that exists.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be published.")] = False,
) -> None:
    """Publish an adapter on the Hub, in one commit. For a merged model, call its own push_to_hub.

    The commit holds the config, the tensors, the card with its pictures, and the records of training and evaluation,
    without paths of this machine. Other files of the folder are not sent. The command uses the token of
    `hf auth login`, or HF_TOKEN.

    \b
    Examples:
      dtem-hf push runs/deit_tiny/adapter user/dtem-deit-tiny --dry-run
      dtem-hf push runs/deit_tiny/adapter user/dtem-deit-tiny --private
      dtem-hf push runs/deit_tiny/adapter other/dtem-deit-tiny --create-pr
    """
    from .hub.publishing import publish_folder, published_files

    if dry_run:
        files = sorted(published_files(folder, repo_id).items())
        where = "no repository is named" if repo_id is None else f"https://huggingface.co/{repo_id}"
        typer.echo(f"Nothing is sent. To be published: {where}{f', branch {branch}' if branch else ''}")
        print_table(("file", "bytes"), [(name, f"{len(data):,}") for name, data in files])
        return
    if repo_id is None:
        raise BadValue("repo_id", repo_id, "USER/REPO, the repository to publish to")
    commit = publish_folder(
        folder,
        repo_id,
        private=private or None,
        branch=branch,
        create_pr=create_pr,
        commit_message=commit_message,
        overwrite_card=overwrite_card,
    )
    typer.echo(f"published: {commit.pr_url or commit}")


@app.command()
def visualize(
    model: Model,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Pictures to draw.")],
    merge: Merges = None,
    method: Method = None,
    r: Reduction = None,
    flops: Flops = None,
    by_layer: Annotated[
        bool, typer.Option("--by-layer", help="Draw one image layer by layer, a row per adapter.")
    ] = False,
    output: Annotated[str, typer.Option(metavar="FILE", help="Where to write the picture.")] = "merged_tokens.png",
) -> None:
    """Draw which patches of an image merge into the same token.

    \b
    Examples:
      dtem-hf visualize facebook/deit-small-patch16-224 cat.jpg dog.jpg --method tome --r 13
      dtem-hf visualize facebook/deit-small-patch16-224 cat.jpg --merge user/dtem-deit-small --output cat.png
    """
    from .files import check_file
    from .labels import method_name
    from .models.auto import auto_class
    from .opening import load_processor, open_image
    from .programs.arguments import check_no_adapter, read_config, read_reduction
    from .progress import hide_other_bars
    from .report.pictures import draw_merged_layers, draw_merged_tokens

    hide_other_bars()
    if merge and method is not None:
        raise BadValue("method", method, "nothing beside --merge: the adapter or config names its method")
    reduction = read_reduction(r, flops)
    check_file("output", output)
    if by_layer and len(images) > 1:
        raise BadValue("by_layer", by_layer, f"one image, not {len(images)}")
    if Path(model).is_file():
        raise BadValue("model", model, "a folder or a Hub id; this is a file")
    for path in images:
        if not path.is_file():
            raise FileNotFoundError(f"there is no picture {path}")
        if Path(output).exists() and path.samefile(output):
            raise BadValue("output", output, "another file than the pictures to draw")
    pictures = [open_image(path, path.name) for path in images]
    config = read_config(model)
    merges = {reference: _read_merge(reference) for reference in merge or ()}
    models: dict[str, Any] = {}
    for label, wanted in (merges or {"": _merge_of(config, method)}).items():
        check_no_adapter("merge" if merge else "method", wanted if isinstance(wanted, MergeConfig) else None)
        merged = auto_class(config).from_pretrained(model, merge=wanted).eval()
        if reduction:
            merged.set_reduction(**reduction)
        # Only the last part of the path: pictures are published, and folder names of this machine are private.
        name = method_name(merged.merge_config.method)
        models[name if name not in models else f"{name} ({Path(label).name}, {len(models) + 1})"] = merged
    if by_layer:
        draw_merged_layers(pictures[0], models, load_processor(model), Path(output))
    else:
        draw_merged_tokens(pictures, models, load_processor(model), Path(output))
    typer.echo(f"written: {output}")


def _add_program(name: str, module: str, summary: str) -> None:
    @app.command(
        name,
        help=f"{summary} Example: dtem-hf {name} --help",
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": False},
    )
    def run(ctx: typer.Context) -> None:
        from .programs.arguments import load_program
        from .progress import hide_other_bars

        hide_other_bars()
        if name in EXTRAS and not {"-h", "--help"} & set(ctx.args):
            need(name, f"dtem-hf {name}")  # names every missing package before the first import fails
        sys.argv = [ctx.command_path, *ctx.args]  # argparse shows the first; run records store all of them
        load_program(module, ctx.args)()


for _name, (_module, _summary) in PROGRAMS.items():
    _add_program(_name, _module, _summary)


def _without_weights(config: PretrainedConfig, merge: Any) -> Any:
    """A merged model on torch's meta device."""
    import torch

    from .models.auto import auto_class

    with torch.device("meta"):
        return auto_class(config).from_config(config, merge=merge)


def _merge_of(config: PretrainedConfig, method: str | None) -> Any:
    """The named method with its defaults. Without a name: the merge saved in the checkpoint, or else DTEM."""
    from .models.attach import UNSET

    if method is None and getattr(config, "merge", None) is not None:
        return UNSET
    return MergeConfig.from_dict({"method": method or "dtem"})


def _read_merge(reference: str) -> MergeConfig | str:
    """Read a config's file; `from_pretrained` reads an adapter's folder or Hub id itself."""
    path = Path(reference)
    return MergeConfig.from_pretrained(path.parent) if path.name == CONFIG_NAME else reference


def main() -> None:
    """Run the command with the arguments of the process."""
    app(prog_name="dtem-hf")


if __name__ == "__main__":
    main()
