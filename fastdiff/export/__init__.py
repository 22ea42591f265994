"""Networks as ONNX files in Optimum's folder layout, verified to draw the same picture."""
