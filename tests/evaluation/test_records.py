"""Which records are still to be made."""

from ttt_e2e.evaluation.records import Records


def test_batches_with_an_unfinished_record_are_left_and_filled_up(tmp_path):
    records = Records(tmp_path, "toy", {}, key=("length", "text"))
    records.add([{"length": 8, "text": n} for n in (0, 1, 2)])
    records.add([{"length": 9, "text": n} for n in range(5)])
    again = Records(tmp_path, "toy", {}, key=("length", "text"))
    for each in (records, again):
        assert each.unfinished((8,), 5, 2) == [([2, 3], [2, 3]), ([4], [4, 4])]
        assert each.unfinished((9,), 5, 2) == []
        assert each.unfinished((7,), 2, 3) == [([0, 1], [0, 1, 1])]
