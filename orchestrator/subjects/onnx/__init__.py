"""ONNX in, as a torch module whose every weight can be fixed, and out.

Why the import is our own: a fixer needs every weight as a parameter, and a converter that only has to compute the same
doesn't keep them. Tried with onnx2torch 1.5.15: it reads legacy exports (opsets 11, 17 and 18), but neither opset 20
(Identity-19) nor what torch exports by default at 18 and 21 (Reshape with allowzero), also after onnx's own version
converter was asked for 17. Of a ResNet-20 it keeps 2,957 of 2,973 parameters, because merged batch norms become
constants, and the dense weights of a LeNet from TensorFlow become buffers, which no fixer edits. It reads single
operators that have no rule here (``second_reader``), and whole files in tests, as an independent reading to be held
against.
"""
