"""`lbaccel export RUN`: a folder that timm and the Hugging Face hub load, with a model card."""

from __future__ import annotations

import argparse
import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from lbaccel.errors import InputError
from lbaccel.export.hub import check_repo_id, push
from lbaccel.runs.lock import writing
from lbaccel.text import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lbaccel export`."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of lbaccel train")
    parser.add_argument(
        "--checkpoint",
        metavar="NAME",
        help="best, best-ema, last or update_000500 (default: best, or last)",
    )
    parser.add_argument(
        "--ema", action="store_true", help="the average of the weights (of a run: the best one)"
    )
    parser.add_argument("--to", type=Path, metavar="DIR", help="folder (default: RUN/export)")
    parser.add_argument("--force", action="store_true", help="replace an earlier export")
    parser.add_argument("--license", metavar="ID", help="for the card, such as apache-2.0")
    parser.add_argument(
        "--push-to-hub", metavar="OWNER/NAME", help="upload the folder to the Hugging Face hub"
    )
    parser.add_argument("--private", action="store_true", help="to a private repository")


def run(args: argparse.Namespace) -> int:
    """Write the folder, and upload it where that was asked for; 0, or an error."""
    from lbaccel.export.model_card import model_card, usage
    from lbaccel.export.read import read_exported
    from lbaccel.export.tables import total
    from lbaccel.export.write import FILES, build, check_target, write_folder

    repo_id: str | None = args.push_to_hub
    if repo_id is not None:
        check_repo_id(repo_id)
    elif args.private:
        raise InputError("--private is for an upload. Add --push-to-hub OWNER/NAME.")
    if args.license is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", args.license):
        raise InputError(f"--license {args.license!r} is no identifier, such as apache-2.0 or mit.")
    target: Path = (args.to if args.to is not None else args.run / "export").resolve()
    exported, weights = read_exported(args.run, checkpoint=args.checkpoint, ema=args.ema)
    check_target(target, args.run, force=args.force)
    model = build(exported, weights)
    card = model_card(exported, license=args.license, repo_id=repo_id)
    with _alone_in(args.run, target):
        write_folder(target, exported, model, card=card, license=args.license)
    done = total(exported.run, "num_updates")
    of = f" of {done:,}" if done is not None else ""
    print(f"{exported.model}{', EMA' * exported.ema}: weights after update {exported.update:,}{of}")
    if exported.unfinished is not None:
        why = printable(exported.unfinished)
        print(f"note: the run is not finished ({why}); the card says so")
    if exported.small_stem:
        print("note: the stem is that for small images: plain timm refuses this folder. Type:")
    else:
        print("to load it:")
    code = usage(exported, folder=str(target)).splitlines()
    print(printable("\n".join(f"  {line}" for line in code if line)))
    print(f"files: {', '.join(FILES)}")
    if repo_id is not None:
        address = push(target, repo_id, private=args.private, title=exported.model)
        print(printable(f"uploaded: {address}"))
    print(printable(str(target)))
    return 0


def _alone_in(run: Path, target: Path) -> AbstractContextManager[None]:
    """The lock of the run where the export lies in it; one that lies elsewhere only reads it."""
    if run.resolve() not in target.parents:
        return nullcontext()
    return writing(run, say=print, instead=", or give another folder with --to")
