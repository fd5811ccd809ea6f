import pytest

import fixers
from fixers.neuron_level.arachne import Arachne


def test_every_wrong_parameter_is_said_at_once():
    with pytest.raises(fixers.ParameterError) as caught:
        Arachne.build({"populaton": 3, "alpha": -1, "search": "ga", "generations": 20.0, "layers": 1}, "quik")
    assert str(caught.value).splitlines() == [
        "arachne has no preset 'quik'; did you mean 'quick'? Valid: first_version, quick, study.",
        "arachne has no parameter 'populaton'; did you mean 'population'? Valid: alpha, generations, layers, "
        "localisation, passes, population, search, selection, target.",
        "Parameter 'alpha' of arachne must be at least 0, but got -1.0.",
        "Parameter 'search' of arachne must be one of de, pso, but got 'ga'.",
        "Parameter 'layers' of arachne must be of type str, but got 1.",
    ]


def test_the_constructor_says_as_much():
    with pytest.raises(fixers.ParameterError) as caught:
        Arachne(population=2, alpha=float("nan"))
    assert str(caught.value).splitlines() == [
        "Parameter 'population' of arachne must be at least 4, but got 2.",
        "Parameter 'alpha' of arachne must be finite, but got nan.",
    ]
