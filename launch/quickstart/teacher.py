"""Train the quickstart's tiny autoregressive teacher; save it as a Hugging Face directory.

It plays the model that a user brings, so it is built from transformers alone: Qwen3ForCausalLM, a
fast tokenizer with one token a character, a chat template, a generation config. Like Qwen3 it has
spare vocabulary rows and no mask token; the first row after the tokenizer (``MASK_ROW``, as 151669
for Qwen3) is free for ``model.mask_token_id``.

A pretrained language model has met typing errors, nonsense and recoveries from both. A model
trained on nothing but perfect additions has not, and what it predicts after a broken prefix is
noise; on-policy distillation asks for exactly that while the student is young. So some sequences
are damaged: response tokens are replaced at random in the *input* (at a rate drawn per sequence
from 0..1) while the labels stay the right tokens, and past its end such a sequence goes on with
random tokens whose label is the end token. Their share rises from none to ``--corrupt`` over the
first half of the training. ``--corrupt 0`` trains on perfect sequences only.
"""

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

from launch.quickstart import task
from megatron_opdlm.errors import Arguments, InputError, RunError, command
from megatron_opdlm.model_files.writing import new_directory, write_json
from megatron_opdlm.reporting.progress import Progress

PAD, END = "<pad>", "<end>"
VOCABULARY = [PAD, END, *task.ALPHABET]  # ids 0..15
MASK_ROW = len(VOCABULARY)  # 16: no tokenizer entry, no meaning to the teacher
VOCAB_SIZE = 32  # rows of the embedding, more than the tokenizer has, as in Qwen3
IGNORED = -100  # label without loss
# Chat turns are the bare texts: "57+68=" is the whole prompt. A finished assistant turn gets its
# end token.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the teacher is trained.

    Steps are optimizer steps; the learning rate falls by a cosine to a tenth of ``lr``.
    """

    steps: int = 1200
    batch_size: int = 32  # sequences
    lr: float = 3e-3
    warmup_steps: int = 20
    corrupt: float = 0.5  # share of damaged sequences from the middle of the training on
    seed: int = 0
    floor: float = 0.95  # least exact match on the validation split


def build_tokenizer():
    """A fast tokenizer, one token a character; a character outside the alphabet is an error."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {token: i for i, token in enumerate(VOCABULARY)}
    backend = Tokenizer(models.WordLevel(ids))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(seed: int):
    """A Qwen3ForCausalLM of about 113,000 parameters in float32, initialised from ``seed``."""
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    end, pad = VOCABULARY.index(END), VOCABULARY.index(PAD)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
    )
    model = Qwen3ForCausalLM(config).float()
    model.generation_config = GenerationConfig(
        eos_token_id=end, pad_token_id=pad, do_sample=False, max_new_tokens=task.MAX_RESPONSE_TOKENS
    )
    return model


def training_rows(
    problems: list[task.Problem], corrupt: float, draw: random.Random
) -> list[tuple[list[int], list[int]]]:
    """Tokenise to ``(input ids, labels)``: labels not yet shifted, ``IGNORED`` in the prompt."""
    ids = {token: i for i, token in enumerate(VOCABULARY)}
    end, noise = ids[END], [i for i in range(len(VOCABULARY)) if i != ids[END]]
    rows = []
    for problem in problems:
        prompt = [ids[c] for c in task.prompt(problem)]
        right = [*(ids[c] for c in task.response(problem)), end]
        seen = right
        if draw.random() < corrupt:
            right = right + [end] * (task.MAX_RESPONSE_TOKENS + 1 - len(right))
            rate = draw.random()
            damaged = [draw.choice(noise) if draw.random() < rate else token for token in right]
            past_end = [draw.choice(noise) for _ in right]
            first_end = right.index(end)
            seen = damaged[:first_end] + past_end[first_end:]
        rows.append((prompt + seen, [IGNORED] * len(prompt) + right))
    return rows


def collate(rows: list[tuple[list[int], list[int]]]):
    """Pad on the right to the longest row: ``input_ids`` and ``labels``, both [rows, longest]."""
    import torch

    longest = max(len(ids) for ids, _ in rows)
    pad = VOCABULARY.index(PAD)
    inputs = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in rows])
    return inputs, labels


def train(model, recipe: Recipe) -> int:
    """Train in place on problems drawn from the training split; returns the labelled tokens."""
    import math

    import torch

    draw = random.Random(f"teacher data {recipe.seed}")
    pool = task.problems("train")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.01
    )

    def scale(step: int) -> float:
        warm = min(1.0, (step + 1) / recipe.warmup_steps)
        return warm * (0.55 + 0.45 * math.cos(math.pi * step / recipe.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    model.train()
    tokens = 0
    with Progress("teacher", recipe.steps, show=True, unit="step") as progress:
        for step in range(recipe.steps):
            corrupt = recipe.corrupt * min(1.0, 2 * step / recipe.steps)
            batch = [draw.choice(pool) for _ in range(recipe.batch_size)]
            inputs, labels = collate(training_rows(batch, corrupt, draw))
            logits = model(input_ids=inputs).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
            )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            tokens += int((labels != IGNORED).sum())
            progress.advance(note=f"loss={loss.item():.4g}")
    model.eval()
    return tokens


def exact_match(model, tokenizer, problems: list[task.Problem]) -> float:
    """Share of problems whose greedy response ends and carries the right answer.

    Rows of one length go together.
    """
    import torch

    by_length: dict[int, list[task.Problem]] = {}
    for problem in problems:
        by_length.setdefault(len(task.prompt(problem)), []).append(problem)
    right = 0
    for group in by_length.values():
        inputs = torch.tensor([tokenizer.encode(task.prompt(p)) for p in group])
        with torch.inference_mode():
            output = model.generate(input_ids=inputs, attention_mask=torch.ones_like(inputs))
        for problem, row in zip(group, output[:, inputs.shape[1] :].tolist(), strict=True):
            text = tokenizer.decode(row)
            right += END in text and text.split(END)[0].split("#")[-1] == task.answer(problem)
    return right / len(problems)


def save(model, tokenizer, out: Path) -> None:
    """Write the directory, whole or not at all."""
    with new_directory(out) as made:
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        # transformers 5 writes a class name that 4.x does not know; both know this one.
        config = made / "tokenizer_config.json"
        fields = json.loads(config.read_text(encoding="utf-8"))
        write_json(config, fields | {"tokenizer_class": "PreTrainedTokenizerFast"})


def main() -> None:
    defaults = Recipe()
    parser = Arguments(description=__doc__)
    parser.add_argument("--out", required=True, type=Path, help="Hugging Face directory to write")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--steps", type=int, default=defaults.steps, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size, help="sequences")
    parser.add_argument("--lr", type=float, default=defaults.lr)
    parser.add_argument(
        "--corrupt", type=float, default=defaults.corrupt, help="share of damaged sequences, 0..1"
    )
    parser.add_argument(
        "--floor", type=float, default=defaults.floor, help="least accuracy on the validation split"
    )
    args = parser.parse_args()
    if args.out.exists():
        raise InputError(f"--out {args.out}: exists already; choose another name or remove it")
    if not 0 <= args.corrupt <= 1:
        raise InputError(f"--corrupt {args.corrupt}: a share; use 0 to 1")
    if args.steps < 1 or args.batch_size < 1:
        raise InputError(f"--steps {args.steps} --batch-size {args.batch_size}: use 1 or more")
    recipe = Recipe(
        steps=args.steps,
        batch_size=args.batch_size,
        lr=args.lr,
        corrupt=args.corrupt,
        seed=args.seed,
        floor=args.floor,
    )

    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)
    start = time.monotonic()
    tokenizer, model = build_tokenizer(), build_model(recipe.seed)
    tokens = train(model, recipe)
    validation = task.problems("validation")
    accuracy = exact_match(model, tokenizer, validation)
    seconds = time.monotonic() - start
    parameters, problems = sum(p.numel() for p in model.parameters()), len(validation)
    print(
        f"teacher: {parameters:,} parameters, {recipe.steps} steps, {tokens:,} response tokens, "
        f"{accuracy:.1%} exact match on {problems} validation problems, {seconds:.0f} s"
    )
    if accuracy < recipe.floor:
        raise RunError(
            f"the teacher reached {accuracy:.1%} on the validation split, {recipe.floor:.0%} is "
            f"needed; train longer (--steps {2 * recipe.steps})"
        )
    save(model, tokenizer, args.out)


if __name__ == "__main__":
    command(main)
