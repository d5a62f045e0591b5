"""Any generative task of lm-evaluation-harness on a model of this project.

    python -m evaluation.lm_eval_model --model opdlm --model_args pretrained=DIR[,NAME=VALUE ...]
        --tasks NAME [--apply_chat_template] [the harness's other flags]

is the harness's own command line with the model ``opdlm`` added; under torchrun the ranks share the
requests. ``pretrained`` is an export or a Megatron checkpoint; the other names are the arguments of
``OpdlmModel``, such as ``block_size``, ``denoising_steps``, ``remasking``, ``threshold``, ``tp``.
"""

import hashlib
import logging
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from evaluation.decoding_flags import Loading, check_model
from evaluation.generation.task_run import sample_key
from evaluation.grading.response import without_thinking
from evaluation.prompting import prompt_from, response_text
from evaluation.sample import open_generator
from megatron_opdlm import launcher, written_values
from megatron_opdlm.diffusion.decoding import ASKED, Decoding
from megatron_opdlm.errors import InputError, RunError, command, nearest
from megatron_opdlm.records import Prompt

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError as error:
    _missing = InputError(
        f"lm-evaluation-harness cannot be used: {error}; run launch/setup.sh, which installs it"
    )

    def _refuse_to_run() -> None:
        raise _missing

    if __name__ == "__main__":
        command(_refuse_to_run)
    raise _missing from error

_log = logging.getLogger(__name__)

# What a task may ask of a generation beside stop strings and length, and what asks for nothing.
_READ = ("do_sample", "temperature", "top_p", "top_k", "seed")
# What --model_args may set; the rest of how to decode is the tasks' own.
_DECODING = [name for name in ASKED if name not in _READ or name == "seed"]
_LOADING = [item.name for item in fields(Loading)]
_NEUTRAL: dict[str, Any] = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1,
    "length_penalty": 1,
    "min_p": 0,
    "use_cache": True,
}


@register_model("opdlm")
class OpdlmModel(LM):
    """The project's rollout engine as the harness sees a model.

    The harness shares nothing out: every rank gets every request, and the copies of the model share
    them here (rank 0 of 1 each, as for other models that split themselves up).
    """

    def __init__(
        self,
        pretrained: str = "",
        *,
        enable_thinking: bool = False,
        batch_size: int | str | None = None,  # the harness hands these over; slots decide instead
        max_batch_size: int | None = None,
        device: str | None = None,
        **settings: Any,
    ) -> None:
        """``settings``: fields of ``Decoding`` but those that tasks choose, and of ``Loading``.
        Without ``block_size`` it is the one that the model was trained with, without
        ``denoising_steps`` a pass commits one token.
        """
        super().__init__()
        _refuse_unknown(settings)
        if not pretrained:
            raise InputError("--model_args needs pretrained=DIR: an export or Megatron checkpoint")
        try:
            pretrained = written_values.path(pretrained)
        except ValueError as error:
            raise InputError(f"pretrained={pretrained} {error}") from error
        check_model(Path(pretrained))
        decoding = Decoding(**_of(settings, _DECODING)).validate()
        self.generator = open_generator(Path(pretrained), Loading(**_of(settings, _LOADING)))
        if self.generator.tokenizer is None:
            raise InputError(f"pretrained={pretrained} has no tokenizer; add its files")
        recorded = self.generator.contract and self.generator.contract.block_size
        size = settings.get("block_size") or recorded or decoding.block_size
        self.decoding = replace(
            decoding,
            block_size=size,
            denoising_steps=settings.get("denoising_steps") or size,
            logit_shift=self.generator.logit_shift,
        )
        self.pretrained, self.enable_thinking = pretrained, enable_thinking
        self._cut = 0  # prompts that were too long
        # The harness writes results where this is 0: on several machines that must be one process.
        os.environ["LOCAL_RANK"] = os.environ.get("RANK", "0")

    @property
    def tokenizer(self) -> Any:
        return self.generator.tokenizer

    @property
    def max_length(self) -> int:
        """Positions of the model."""
        return self.generator.longest

    @property
    def tokenizer_name(self) -> str:
        return self.pretrained.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's text; ``chat_template`` may name one of several."""
        if chat_template is False:
            return None
        name = chat_template if isinstance(chat_template, str) else None
        try:
            return self.tokenizer.get_chat_template(name)
        except ValueError as error:
            reason = str(error).partition("\n")[0]
            raise InputError(
                f"--apply_chat_template: {reason}; use a model whose tokenizer has a template"
            ) from error

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Messages as text; without a generation prompt the last message is gone on with."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            enable_thinking=self.enable_thinking,
        )

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """One text a request, without thinking, cut before the first of its stop strings.

        A request's random numbers depend on the seed, its document and how often that was asked.
        """
        self._require_agreement(requests)
        self._cut = 0
        asked: dict[Decoding, list[int]] = {}
        stops, prompts, keys = [], [], []
        times: Counter[tuple[str, int]] = Counter()
        for number, request in enumerate(requests):
            context, arguments = request.args
            decoding, until = self._decoding_of(arguments)
            asked.setdefault(decoding, []).append(number)
            stops.append(until)
            prompts.append(self._prompt(number, context, decoding.max_new_tokens))
            document = (str(request.task_name), int(request.doc_id or 0))
            keys.append(sample_key(document[1], times[document]))
            times[document] += 1
        if self._cut and self.generator.is_writer:
            _log.warning("%d prompts were cut on the left to leave room for responses", self._cut)
        texts = [""] * len(requests)
        for decoding, numbers in asked.items():
            made = self.generator.generate(
                [prompts[i] for i in numbers], decoding, [keys[i] for i in numbers]
            )
            for i, trajectory in zip(numbers, made, strict=True):
                text = without_thinking(response_text(self.tokenizer, trajectory)) or ""
                texts[i] = cut_before(text, stops[i])
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise _no_likelihood("loglikelihood")

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        raise _no_likelihood("loglikelihood_rolling")

    def _decoding_of(self, arguments: dict[str, Any]) -> tuple[Decoding, list[str]]:
        """How a task wants its responses generated, and its stop strings."""
        wanted = normalize_gen_kwargs(arguments, self.decoding.max_new_tokens)
        for name, value in arguments.items():
            if name in _NEUTRAL and value != _NEUTRAL[name]:
                raise InputError(
                    f"a task asks for {name}={value}, which this engine has not; use --gen_kwargs "
                    f"{name}={_NEUTRAL[name]}"
                )
        kwargs: dict[str, Any] = dict(wanted)
        until = [text for text in kwargs.pop("until", None) or [] if text]
        limit = int(kwargs.pop("max_gen_toks"))
        foreign = [name for name in kwargs if name not in (*_READ, *_NEUTRAL)]
        if foreign:
            raise InputError(
                f"a task asks for {foreign[0]}={kwargs[foreign[0]]}, which this engine has not; it "
                f"knows until, max_gen_toks, {', '.join(_READ)}"
            )
        decoding = replace(
            self.decoding,
            max_new_tokens=limit,
            temperature=float(kwargs.get("temperature") or 0.0),
            top_p=float(kwargs.get("top_p") or 1.0),
            top_k=max(int(kwargs.get("top_k") or 0), 0),
            seed=int(kwargs.get("seed", self.decoding.seed)),
        )
        return decoding.validate(), until

    def _prompt(self, number: int, context: str, limit: int) -> Prompt:
        """A request's tokens; where they leave no room for ``limit`` response tokens, the last ones
        of them, as the harness's own models have it.
        """
        prompt = prompt_from(number, {"prompt": context}, self.tokenizer, where="lm-eval request")
        room = self.max_length - limit
        if room < 1:
            raise InputError(
                f"max_gen_toks={limit} leaves no room for a prompt in the model's "
                f"{self.max_length} positions; use --gen_kwargs max_gen_toks=N"
            )
        if len(prompt.ids) > room:
            self._cut += 1
            prompt = replace(prompt, ids=prompt.ids[-room:])
        return prompt

    def _require_agreement(self, requests: Sequence[Any]) -> None:
        """RunError where ranks were given different requests, as by caches that differ: they would
        wait for each other for ever.
        """
        text = repr([request.args for request in requests])
        digest = hashlib.sha256(text.encode("utf-8", errors="backslashreplace")).hexdigest()
        from megatron_opdlm import parallel

        if not parallel.all_succeeded(digest == self.generator.share(digest)):
            raise RunError(
                "the ranks were given different requests; remove the files of --use_cache, or use "
                "one process"
            )


def cut_before(text: str, stops: Sequence[str]) -> str:
    """The text up to the first place where any of the stop strings begins.

    >>> cut_before("4\\n\\nQ: 2", ["Q:", "\\n"])
    '4'
    """
    places = [text.index(stop) for stop in stops if stop in text]
    return text[: min(places)] if places else text


def _of(settings: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Those of the settings that were given."""
    return {name: settings[name] for name in names if settings.get(name) is not None}


def _refuse_unknown(settings: Mapping[str, Any]) -> None:
    names = [*_DECODING, *_LOADING, "enable_thinking", "pretrained"]
    for name, value in settings.items():
        if name not in names:
            raise InputError(
                f"--model_args {name}={value}: not known; use {', '.join(names)}"
                f"{nearest(name, names)}"
            )


def _no_likelihood(kind: str) -> InputError:
    return InputError(
        f"a task asks for {kind}, but a block-diffusion model has no likelihood of a given text to "
        "compare; use generative tasks (output_type: generate_until), such as gsm8k or ifeval"
    )


def main() -> None:
    """The harness's command line. Only one process speaks and writes."""
    from lm_eval.__main__ import cli_evaluate

    if launcher.rank() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 -- until the end
    cli_evaluate()


if __name__ == "__main__":
    command(main)
