"""A teacher-student image classifier in a series of notebooks; this package is what they import."""

import os

# Before TensorFlow starts: its notes on every start are many, and its errors come as exceptions.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
