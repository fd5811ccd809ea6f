from fixers import network


def test_layers_come_in_order_of_execution(lenet):
    names = [layer.name for layer in network.layers(lenet, (1, 8, 8))]
    assert names[0] == "features.0"
    assert names[-1] == "classifier.5"
    assert network.linear_runs(network.layers(lenet, (1, 8, 8))) == [["classifier.1", "classifier.3", "classifier.5"]]
