"""The paper's figures as shipped, held by relations that a wrong digit or a wrong place breaks."""

import re

import pytest

from evaluation.reporting.published import PublishedTable, sweeps, tables, training_cost

BY_NUMBER = {table.number: table for table in tables()}

# Sums over each row and each column, in tenths of a percent: added up from the printed tables.
SUMS = {
    "1": (
        [4890, 3296, 2296, 4097, 3436, 1170, 5992, 4268, 612, 429, 558, 410, 4317, 4295, 569, 233],
        [6711, 6276, 3688, 4513, 7247, 5934, 6499],
    ),
    "2": ([3480, 2946, 589, 580, 667, 502], [2090, 2124, 2183, 2367]),
    "3": ([2706, 2577, 245, 2239], [1535, 1530, 1435, 1689, 1578]),
    "5": (
        [9697, 7970, 2010],
        [1654, 1203, 1114, 1772, 1751, 1696, 2252, 1841, 1861, 2171, 2362],
    ),
    "6": ([2529, 1264, 1276, 1904, 3015, 1994, 2049, 2424], [2724, 2263, 4447, 3463, 3558]),
    "7": ([6165, 5564, 1384], [2000, 2079, 2132, 1696, 1671, 1861, 1674]),
    "8": ([845, 397, 422, 462, 900, 642, 439, 503], [2263, 2347]),
    "9": ([1160, 589, 580], [240, 268, 561, 248, 632, 380]),
    "10": ([1321, 947, 588, 985, 1744, 1482, 268, 230, 1220, 1164], [4990, 4959]),
    "11": ([3443, 2910, 527, 473, 2317, 2323], [2991, 2939, 3099, 2964]),
}
# The paper disagrees with itself here: (table, benchmark, column) against another table.
CONTRADICTIONS = {
    ("11", "HumanEval", "OPDLM-4B"),
    ("11", "MBPP", "OPDLM-4B"),
    ("11", "MBPP", "SFT-4B"),
}
ROWS = {"GSM8K": 1319, "MATH-500": 500, "HumanEval": 164, "MBPP": 378, "ZebraLogic": 1000}


@pytest.mark.parametrize("number", BY_NUMBER)
def test_every_figure_is_the_printed_one(number: str):
    """Claim: a wrong figure breaks the sum of its row and of its column; two that changed places in
    a row break their columns', in a column their rows'."""
    table = BY_NUMBER[number]
    assert all(list(row) == table.columns for row in table.rows.values())
    rows = [round(sum(10 * v for v in row.values() if v)) for row in table.rows.values()]
    columns = [
        round(sum(10 * row[name] for row in table.rows.values() if row[name]))  # type: ignore[operator]
        for name in table.columns
    ]
    assert (rows, columns) == SUMS[number]


def test_figures_that_stand_in_several_tables_agree():
    """Claim: but for three that the paper prints in two versions, and which the tables name."""
    seen: dict[tuple[str, str], float] = {}
    for table in tables():
        for benchmark, row in table.rows.items():
            for column, value in row.items():
                if value is None or (table.number, benchmark, column) in CONTRADICTIONS:
                    continue
                assert seen.setdefault((benchmark, column), value) == value, (table.number, column)
    for number, benchmark, column in CONTRADICTIONS:
        assert BY_NUMBER[number].rows[benchmark][column] != seen[benchmark, column]
    assert all(word in _notes(BY_NUMBER) for word in ("HumanEval 56.1", "MBPP 57.7", "MBPP 59.0"))


def _notes(by_number: dict[str, PublishedTable]) -> str:
    return " ".join(table.note for table in by_number.values())


def test_figures_are_possible_ones():
    """Claim: accuracies of one response a problem are whole numbers of problems (the converted
    models'; those of others come from their own papers)."""
    for table in tables():
        for benchmark, n in ROWS.items():
            for column, value in table.rows.get(benchmark, {}).items():
                if value is not None and column.startswith(("OPDLM", "SFT")):
                    nearest = round(100 * round(value * n / 100) / n, 1)
                    assert nearest == value, (table.number, benchmark, column)


def test_the_sweeps_end_in_the_tables():
    """Claim: threshold 1 is static decoding (Table 1), threshold 0.9 at blocks of 4 is Table 11's
    dynamic column and the block sweep's first point."""
    threshold, blocks = sweeps()
    by_value = dict(zip(threshold.values, threshold.points, strict=True))
    assert round(100 * by_value[1.0].accuracy, 1) == BY_NUMBER["1"].rows["MATH-500"]["OPDLM-4B"]
    dynamic = BY_NUMBER["11"].rows["MATH-500"]["OPDLM-4B dynamic 0.9"]
    assert round(100 * by_value[0.9].accuracy, 1) == dynamic
    assert by_value[0.9] == blocks.points[0] and blocks.values[0] == 4


def test_operations_follow_from_parameters_and_tokens():
    """Claim: 8 N D for the distilled models (6 for the student, 2 for the teacher), 6 N D for the
    others, to the digits that are printed; N is in the model's name."""
    with_cost = set()
    for table in tables():
        for column in table.columns:
            cost = training_cost(column)
            if cost is None:
                continue
            with_cost.add(column)
            size = re.search(r"-([\d.]+)B", column)
            assert size is not None
            factor = cost[1] / cost[0] / float(size[1]) / 1e9
            assert factor == pytest.approx(8 if column.startswith("OPDLM") else 6, rel=0.02)
    assert with_cost >= {*BY_NUMBER["1"].columns, *BY_NUMBER["6"].columns}


def test_deviations_stand_beside_every_mean_of_the_table_over_seeds():
    (table,) = [table for table in tables() if table.deviations]
    assert table.number == "9"
    for benchmark, row in table.rows.items():
        assert set(table.deviations[benchmark]) == {m for m, value in row.items() if value}
    total = sum(x for row in table.deviations.values() for x in row.values())
    assert total == pytest.approx(2.3 + 1.3 + 2.7 + 3.7 + 3.6 + 4.4 + 5.0 + 2.2 + 3.4 + 5.0 + 8.4)
