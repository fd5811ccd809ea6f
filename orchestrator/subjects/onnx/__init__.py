"""ONNX in, as a torch module whose every weight can be fixed, and out."""
