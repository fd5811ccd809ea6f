import torch

from fixers.training.best_weights import BestWeights


def test_best_weights_are_clones_and_come_back_bit_for_bit(make_problem, resnet):
    model = make_problem(resnet).new_model()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    best = BestWeights(model, 0.5)
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            value.add_(1)
    assert not best.offer(model, 0.5)
    assert not best.offer(model, float("nan"))
    best.restore(model)
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        model.head.bias.add_(1)
    assert best.offer(model, 0.6)
    assert best.score == 0.6
