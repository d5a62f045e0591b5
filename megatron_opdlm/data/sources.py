"""The published training sets: where they are, and what is asked of the model for a row of each."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_opdlm.errors import InputError, RunError, nearest

MATH = "{question}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
CHOICE = (
    "{question}\nPlease show your choice in the answer field with only the choice letter, e.g., "
    '"answer": "C".'
)
PLAIN = "{question}"
BY_DOMAIN: Mapping[str, str] = {"math": MATH, "science": CHOICE, "code": PLAIN, "chat": PLAIN}
TEMPLATES = ("none", "math", "by_domain")


@dataclass(frozen=True, kw_only=True)
class Published:
    """A file of a data repository on the Hugging Face Hub."""

    repository: str
    file: str
    template: str


PUBLISHED: Mapping[str, Published] = {
    "opdlm_train": Published(
        repository="divelab/opdlm_train_data", file="opdlm_train.json", template="by_domain"
    ),
    "math_train": Published(
        repository="divelab/opdlm_eval_data", file="MATH_train_traceRL.json", template="math"
    ),
    "dapo": Published(
        repository="BytedTsinghua-SIA/DAPO-Math-17k",
        file="data/dapo-math-17k.parquet",
        template="math",
    ),
}

# Data files of these names are trained on; evaluation asks them only to see what a run has learnt.
_STEMS = (Path(source.file).stem for source in PUBLISHED.values())
TRAINING_SETS = frozenset([*PUBLISHED, *_STEMS, "DAPO_Math_17k", "GSM8K_train"])


def published_as(path: Path) -> Published | None:
    """The published set whose file a local one is, by its name."""
    return next(
        (source for source in PUBLISHED.values() if Path(source.file).name == path.name), None
    )


def ask(question: str, domain: str | None, template: str) -> str:
    """The user's message for a question. In a set by domain, a row without one asks mathematics, as
    in the reference, and one of a domain that the set does not know asks it as it is.
    """
    if template == "by_domain":
        form = BY_DOMAIN.get(domain or "math", PLAIN)
    else:
        form = MATH if template == "math" else PLAIN
    return form.format(question=question)


def fetch(name: str, revision: str | None = None, cache: Path | None = None) -> Path:
    """A published set's file, downloaded unless it is in the cache (``HF_HOME``, or ``cache``)."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if name not in PUBLISHED:
        known = ", ".join(PUBLISHED)
        raise InputError(
            f"--source {name}: neither a file nor a published set; use {known}, or a file"
            + nearest(name, PUBLISHED)
        )
    source = PUBLISHED[name]
    try:
        return Path(
            hf_hub_download(
                source.repository,
                source.file,
                repo_type="dataset",
                revision=revision,
                cache_dir=cache,
            )
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        first = " ".join(str(error).split())[:200]
        raise RunError(
            f"{source.file} of {source.repository} cannot be fetched ({first}); download it where "
            "there is a network and give its path as --source"
        ) from error
