"""What the pages name is there: links, paths, every page in the index, README's tree."""

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[3]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
ANCHOR = re.compile(r"\]\((?!https?:)([^)#\s]*)#([^)\s]+)\)")
# A file, or in backquotes a folder, from a folder of the repository's root.
FOLDERS = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != ".")
PATH = re.compile(
    rf"(?<![\w/.-])((?:{FOLDERS})/[\w./-]*(?:\.(?:py|sh|yaml|md|txt|sbatch)\b|(?<=\w)/(?=`)))"
)
# A file or a folder in a line of README's tree.
WORD = re.compile(r"(?<![\w/.])[a-z_0-9]+(?:/|\.(?:py|sh|md|yaml))(?![\w/])")


def test_links_lead_somewhere():
    missing = [
        f"{page.name}: {target}"
        for page in PAGES
        for target in LINK.findall(page.read_text())
        if not (page.parent / target).exists()
    ]
    assert not missing


def headings(page: Path) -> set[str]:
    """Anchors as GitHub makes them: small letters, no punctuation, a dash for each space."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


def test_links_lead_to_headings():
    found = [
        (page, page.parent / target if target else page, anchor)
        for page in PAGES
        for target, anchor in ANCHOR.findall(page.read_text())
    ]
    missing = [
        f"{page.name}: {target.name}#{anchor}"
        for page, target, anchor in found
        if target.suffix == ".md" and anchor not in headings(target)
    ]
    assert found and not missing


def test_paths_exist():
    missing = [
        f"{page.name}: {path}"
        for page in PAGES
        for path in PATH.findall(page.read_text())
        if not (ROOT / path).exists()
    ]
    assert not missing


def test_the_index_has_every_page():
    linked = set(LINK.findall((ROOT / "docs" / "index.md").read_text()))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - linked == {"index.md"}


def test_the_tree_in_readme_is_the_repositorys():
    """Claim: every word in it that looks like a file or folder is one, in the folder of its line,
    beside it or in the repository's root; and no source folder is left out."""
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    tree = text.partition("## The tree\n\n")[2].partition("\n\n")[0]
    top, seen, missing = ROOT, set(), []
    for line in tree.splitlines():
        words = WORD.findall(line)
        if line[4] != " ":
            top = ROOT / words[0]
        own = top / (line.split()[0] if line[6] != " " else "")
        for word in words:
            places = [place / word for place in (own, top, ROOT) if (place / word).exists()]
            missing += [] if places else [line]
            seen.update(place.resolve() for place in places)
    assert not missing
    sources = {"megatron_opdlm", "checkpoint_tools", "evaluation"}
    folders = [file.parent for name in sources for file in (ROOT / name).glob("*/__init__.py")]
    assert not [folder for folder in folders if folder not in seen]


def test_the_hooks_and_ci_run_what_the_project_runs():
    """Claim: the hooks' ruff is the environment's; CI calls tests/run.sh on the Pythons that the
    project supports."""
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    entries = [hook["entry"] for repository in hooks["repos"] for hook in repository["hooks"]]
    assert entries == [".venv/bin/ruff check --fix", ".venv/bin/ruff format"]
    (job,) = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"].values()
    assert job["steps"][-1]["run"] == "tests/run.sh"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11,<3.13"
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12"]
