"""Models in the formats of other systems.

onnx  one ONNX file, from uint8 images to packed codes
"""
