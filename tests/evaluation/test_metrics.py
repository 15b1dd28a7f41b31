import pytest
import torch

from slowfast_ext.evaluation import evaluate, mean_class_accuracy, top_k_accuracy

SCORES = torch.tensor(
    [
        [0.1, 0.2, 0.3, 0.15, 0.05, 0.2],  # best 2, smallest 4
        [0.9, 0.0, 0.1, 0.2, 0.3, 0.4],  # best 0, smallest 1
        [0.0, 0.1, 0.2, 0.3, 0.4, 0.5],  # best 5
        [0.5, 0.1, 0.2, 0.3, 0.4, 0.0],  # best 0
    ]
)


def test_top_k_is_the_share_of_labels_among_the_k_largest():
    labels = torch.tensor([2, 1, 0, 4])
    assert top_k_accuracy(SCORES, labels) == [0.25, 0.5]
    assert top_k_accuracy(SCORES, labels, (2,)) == [0.5]
    assert top_k_accuracy(SCORES, labels, (6, 7)) == [1.0, 1.0]


def test_equal_scores_are_ordered_by_class():
    """As read from the end of a stable ascending sort: the highest class comes first."""
    scores = torch.zeros(6, 6)
    assert top_k_accuracy(scores, torch.arange(6)) == [1 / 6, 5 / 6]
    assert top_k_accuracy(scores[:1], torch.tensor([5])) == [1.0, 1.0]
    assert top_k_accuracy(scores[:1], torch.tensor([0])) == [0.0, 0.0]


def test_top_k_agrees_with_sorting():
    scores, labels = torch.randn(200, 11).round(decimals=1), torch.randint(11, (200,))
    order = scores.argsort(dim=1, stable=True)
    expected = [(order[:, -k:] == labels[:, None]).any(1).double().mean().item() for k in (1, 5)]
    assert top_k_accuracy(scores, labels) == expected


def test_mean_class_accuracy_is_a_mean_of_recalls():
    # Class 0: one of two recognised; class 5: recognised; nothing else occurs.
    assert mean_class_accuracy(SCORES[1:], torch.tensor([0, 5, 0])) == 1.0
    assert mean_class_accuracy(SCORES, torch.tensor([2, 0, 5, 5])) == pytest.approx((1 + 1 + 0.5) / 3)


def test_a_class_that_is_only_predicted_counts_as_zero():
    # Predictions 2, 0, 5, 0; labels 2, 1, 5, 0: recalls 1 (class 2), 0 (1), 1 (5), 1 (0).
    assert mean_class_accuracy(SCORES, torch.tensor([2, 1, 5, 0])) == 0.75
    # Class 0 is predicted twice and never right.
    assert mean_class_accuracy(SCORES, torch.tensor([2, 2, 5, 5])) == pytest.approx((0.5 + 0.5 + 0) / 3)


def test_evaluate_names_its_results_as_the_logs_do():
    labels = torch.tensor([2, 1, 5, 0])
    assert list(evaluate(SCORES, labels)) == ["top1_acc", "top5_acc", "mean_class_accuracy"]
    assert evaluate(SCORES, labels, ["mean_class_accuracy"]) == {"mean_class_accuracy": 0.75}
    assert list(evaluate(SCORES, labels, ["top_k_accuracy"], topk=(3, 1))) == ["top3_acc", "top1_acc"]


@pytest.mark.parametrize(
    ("labels", "metrics", "message"),
    [
        ([2, 1, 5], ["top_k_accuracy"], r"must be \(N, num_classes\) and \(N,\).*\(4, 6\) and \(3,\)"),
        ([2, 1, 5, 6], ["top_k_accuracy"], r"labels must be in \[0, 6\), got 1 to 6"),
        ([2, 1, 5, -1], ["mean_class_accuracy"], r"labels must be in \[0, 6\), got -1 to 5"),
        ([2, 1, 5, 0], ["top_k"], "metrics must be among .*got 'top_k'"),
    ],
)
def test_scores_and_labels_must_belong_together(labels, metrics, message):
    with pytest.raises(ValueError, match=message):
        evaluate(SCORES, torch.tensor(labels), metrics)
