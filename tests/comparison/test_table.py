from dataclasses import replace

from finemill.comparison.summary import Line, Score
from finemill.comparison.table import Opinions, cells

HALF = Score(0.5, 0.1, 12)


def test_a_change_stands_beside_what_it_is_a_change_of() -> None:
    scores = {"exact_match": HALF, "cut_off": HALF, "tokens": Score(9.0, 1.0, 12)}
    lines = [
        Line("base", "template", 1, scores, "exact_match", None, None),
        Line("tuned", "template", 1, scores, "exact_match", None, Score(0.25, 0.1, 12)),
    ]
    table = cells(lines, Opinions())
    assert table.head == ("model", "mode", "exact_match", "exact_match change", "cut_off", "tokens")
    assert table.rows[0] == ("base", "template", "50.0 ± 19.6", "", "50.0 ± 19.6", "9")
    assert table.rows[1][3] == "+25.0 ± 19.6"
    sampled = [replace(line, num_samples=2, seed_spread=0.031) for line in lines]
    assert (cells(sampled, Opinions()).head[-1], cells(sampled, Opinions()).rows[1][-1]) == ("spread over seeds", "3.1")
    assert cells(lines[:1], Opinions()).head == ("model", "mode", "exact_match", "cut_off", "tokens")
