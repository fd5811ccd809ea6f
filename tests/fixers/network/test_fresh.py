import torch

from fixers import network


def test_reinitialised_weights_depend_on_the_seed_alone(lenet):
    state = torch.get_rng_state()
    one, same, other = (network.reinitialised(lenet, seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(one.classifier[1].weight, same.classifier[1].weight)
    assert not torch.equal(one.classifier[1].weight, other.classifier[1].weight)
    assert not torch.equal(one.classifier[1].weight, lenet.classifier[1].weight)


def test_fresh_weights_leave_the_generator_of_their_device_where_it_was(monkeypatch, lenet):
    """A GPU's generator is seeded with the CPU's; put back must be that of the model's device, too."""
    forked, fork = [], torch.random.fork_rng
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: forked.append(list(devices)) or fork(devices=[]))
    with network.seeded(0, torch.device("cuda:1")):
        pass
    with network.seeded(0, torch.device("cpu")):
        pass
    assert forked == [[torch.device("cuda:1")], []]
    before = torch.get_rng_state()
    first, second, other = (network.reinitialised(lenet, seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    weights = [model.classifier[1].weight for model in (first, second, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
