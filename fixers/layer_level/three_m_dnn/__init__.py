"""3M-DNN: minimal modifications of several fully connected layers at once, searched over what lies between them."""

from fixers.layer_level.three_m_dnn.three_m_dnn import ThreeMDNN

__all__ = ["ThreeMDNN"]
