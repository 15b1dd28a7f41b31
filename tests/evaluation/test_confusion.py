import torch

from slowfast_ext.evaluation.confusion import confusion_matrix, most_confused, recalls


def test_rows_are_right_classes_and_columns_predicted_ones():
    scores = torch.tensor([[0.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 2, 1], [0, 3, 0, 0], [0, 3, 0, 0]])
    matrix = confusion_matrix(scores, torch.tensor([1, 0, 2, 2, 2]))
    assert matrix.tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 2, 1, 0], [0, 0, 0, 0]]
    torch.testing.assert_close(recalls(matrix), torch.tensor([1, 1, 1 / 3, torch.nan]).double(), equal_nan=True)


def test_the_most_frequent_errors_come_first_and_hits_are_none():
    matrix = torch.tensor([[9, 1, 0], [4, 9, 0], [0, 3, 9]])
    assert most_confused(matrix, 2) == [(1, 0, 4), (2, 1, 3)]
    assert most_confused(matrix, 9) == [(1, 0, 4), (2, 1, 3), (0, 1, 1)]
