"""Training runs as one HTML file that needs no network: curves, compared runs, and responses drawn
pass by pass.

    opdlm page runs/a --out a.html
    opdlm page small=runs/a large=runs/b --out both.html

A RUN is a directory of train.out, also of a run that still goes on; NAME is what the page calls
it. The file is replaced if it exists, so the same command brings it up to date. docs/run-page.md
"""

import base64
import hashlib
import html
from collections import Counter
from pathlib import Path
from typing import Any

from launch.run_page.records import read_run
from megatron_opdlm import written_values
from megatron_opdlm.errors import Arguments, InputError, command
from megatron_opdlm.model_files.writing import check_place, to_json, write_text

PAGE = "page.html"
RUN = "run"  # a training's directory within what the pipeline or the quickstart makes
_HERE = Path(__file__).parent


def render(runs: list[dict[str, Any]]) -> str:
    """The page. Whatever a model wrote is data: it stands in JSON without ``<``, the script only
    ever makes text of it, and the policy lets no other script run and nothing be fetched.
    """
    script = "".join(
        (_HERE / name).read_text(encoding="utf-8") for name in ("curves.js", "trajectory.js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    data = to_json({"runs": runs}).replace("&", "\\u0026").replace("<", "\\u003c")
    parts = {
        "POLICY": f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "img-src data:; base-uri 'none'; form-action 'none'",
        "TITLE": html.escape(" · ".join(run["name"] for run in runs)),
        "STYLE": (_HERE / "page.css").read_text(encoding="utf-8"),
        "DATA": data,
        "SCRIPT": script,
    }
    # In one go: what is filled in is not searched for names again.
    first, *rest = (_HERE / "page.html").read_text(encoding="utf-8").split("@@")
    filled = (parts[piece] if i % 2 == 0 else piece for i, piece in enumerate(rest))
    return first + "".join(filled)


def name_runs(arguments: list[str]) -> dict[str, Path]:
    """``[NAME=]RUN`` -> name and directory. InputError where two have one name."""
    named = []
    for argument in arguments:
        try:
            name, path = written_values.named_path(argument)
        except ValueError as error:
            raise InputError(f"{argument} {error}") from error
        directory = Path(path)
        named.append((name or _name_of(directory.resolve()), directory))
    for name, count in Counter(name for name, _ in named).items():
        if count > 1:
            raise InputError(f"{count} runs are called {name!r}; name them apart: NAME=RUN")
    return dict(named)


def _name_of(directory: Path) -> str:
    """The last part that tells runs apart."""
    return directory.parent.name if directory.name == RUN else directory.name


def main() -> None:
    parser = Arguments(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="[NAME=]RUN")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.html",
        help=f"default: {PAGE} in the first run's directory",
    )
    args = parser.parse_args()
    named = name_runs(args.runs)
    out: Path = args.out or next(iter(named.values())) / PAGE
    if out.suffix != ".html":
        raise InputError(f"--out {out}: a page is a file that ends in .html; name it so")
    if out.is_dir():
        raise InputError(f"--out {out}: is a directory; name a file in it")
    check_place(out, f"--out {out}")
    runs = [read_run(directory, name) for name, directory in named.items()]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, render(runs))
    print(f"page: {out}")


if __name__ == "__main__":
    command(main)
