"""TensorFlow: Keras models and ``tf.Module``. One file per format."""

from modelserve.adapters.frameworks.tensorflow.adapter import TensorFlowFramework

__all__ = ["TensorFlowFramework"]
