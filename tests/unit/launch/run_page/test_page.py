"""Runs as one page: the passes are the run's own, and nothing that a model wrote becomes markup."""

import json
from html.parser import HTMLParser

import pytest

from launch.run_page.page import name_runs, render
from launch.run_page.records import columns, read_lines, read_run, response, spread
from megatron_opdlm.errors import InputError

HOSTILE = (
    "</script><script>document.title='owned'</script>",
    "<!--<script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "&lt;b&gt; @@SCRIPT@@ \u2028 \ud800 \u202e",
)


def sample(step=1, **more):
    """Two prompt tokens and blocks of four: the first block has two response tokens."""
    return {
        "step": step,
        "sample": 7,
        "prompt_ids": [1, 2],
        "response_ids": [11, 12, 13, 14, 15, 16],
        "committed_at": [2, 1, 3, 1, 2, 1],
        "response_tokens": 5,
        "finish_reason": "stop",
        "forwards": 6,
        **more,
    }


def write_run(directory, *, steps=3, samples=(), block_size=4):
    directory.mkdir()
    rows = [
        {
            "step": step,
            "loss": 1 / step,
            "kl_by_masked_fraction": {"0.50": 0.5, "1.00": 2 / step},
            "kl_by_block_position": {"1": 0.5, "2": 1 / step},
            "slowest_seconds": {"rollout": 2.0 + step},
            "slowest_rank": {"rollout": 1},
            "peak_memory_bytes_by_phase": {"rollout": 2**30, "update": 2**31 + step},
            "cumulative_trained_tokens": 100 * step,
        }
        for step in range(1, steps + 1)
    ]
    for name, lines in (("metrics", rows), ("samples", samples)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (directory / f"{name}.jsonl").write_text(text)
    (directory / "config.yaml").write_text(
        f"rollout: {{block_size: {block_size}}}\nstates: {{block_alignment: absolute}}\n"
    )
    return directory


def test_passes_are_counted_over_blocks_one_after_the_other():
    """Claim: a token's pass over the response is its own plus all of the blocks before; blocks are
    counted from the prompt's first token, or from the response's where the run says so."""
    absolute = response(sample(), 4, "absolute")
    assert absolute["blocks"] == [0, 0, 1, 1, 1, 1]
    assert absolute["passes_of_block"] == [2, 3]
    assert absolute["passes"] == [2, 1, 5, 3, 4, 3]
    own = response(sample(), 4, "response")
    assert own["blocks"] == [0, 0, 0, 0, 1, 1]
    assert own["passes"] == [2, 1, 3, 1, 5, 4]
    assert own["texts"][0] == "11 ", "ids where no texts are recorded"
    assert response(sample(response_texts=list("abcdef")), 4, "response")["texts"][0] == "a"


def test_a_run_that_goes_on_is_read_to_its_last_whole_line(tmp_path):
    """Claim: half of a line at the end is left out; damage elsewhere is an error with its line."""
    run = write_run(tmp_path / "run", steps=3, samples=[sample()])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    read = read_run(run, "a")
    assert read["columns"]["step"] == [1, 2, 3]
    assert read["columns"]["kl_by_masked_fraction/1.00"] == [2, 1, 0.666667]
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(InputError, match=r"metrics.jsonl line 2: not JSON"):
        read_lines(run / "metrics.jsonl")


def test_long_runs_are_thinned_and_gaps_stay_gaps():
    """Claim: at most so many rows, first and last among them; a row without a number has None."""
    rows = [{"step": i} for i in range(1, 2346)]
    kept = [row["step"] for row in spread(rows, 100)]
    assert len(kept) == len(set(kept)) == 100 and (kept[0], kept[-1]) == (1, 2345)
    assert columns([{"step": 1}, {"step": 2, "a": 0.5}]) == {"step": [1, 2], "a": [None, 0.5]}


def test_bad_input_is_named(tmp_path):
    """Claim: no run, a run without a step, and two runs of one name are errors that say so."""
    with pytest.raises(InputError, match=r"holds no metrics.jsonl; give the directory"):
        read_run(tmp_path, "a")
    with pytest.raises(InputError, match="no training step is recorded yet"):
        read_run(write_run(tmp_path / "new", steps=0), "a")
    with pytest.raises(InputError, match=r"2 runs are called 'small'; name them apart"):
        name_runs(["a/small", "b/small"])
    assert list(name_runs(["x=a/run", "b/run", "c"])) == ["x", "b", "c"]


class Scripts(HTMLParser):
    """The page's elements as a parser of its own sees them."""

    def __init__(self):
        super().__init__()
        self.tags, self.scripts, self._is_script = [], [], False

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._is_script = tag == "script"

    def handle_endtag(self, tag):
        self._is_script = False

    def handle_data(self, data):
        if self._is_script:
            self.scripts.append(data)


def parsed(page):
    parser = Scripts()
    parser.feed(page)
    return parser


def test_a_hostile_response_adds_no_element(tmp_path):
    """Claim: the page with hostile texts has the elements of the page with harmless ones, and its
    data holds the texts unchanged."""
    texts = [*HOSTILE, "\n", ""]
    pages = []
    for name, these in (("plain", ["a"] * 6), ("hostile", texts)):
        rows = [sample(response_texts=these, prompt=these[0])]
        run = write_run(tmp_path / name, samples=rows)
        pages.append(parsed(render([read_run(run, f"{name}{these[2]}")])))
    harmless, hostile = pages
    assert hostile.tags == harmless.tags
    data, script = hostile.scripts
    assert script == harmless.scripts[1]
    [shown] = json.loads(data)["runs"][0]["samples"]
    assert shown["texts"] == texts and shown["prompt"] == texts[0]
