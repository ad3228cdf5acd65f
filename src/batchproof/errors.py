"""The exceptions batchproof raises. Every message names the value seen and the value wanted.

* BatchproofError

  * ArgumentError (a ValueError): a value out of range, a wrong name

    * ShapeError: a tensor of the wrong shape
    * LayoutError: tensors that overlap, or a layout an in-place op cannot write

  * DtypeError (a TypeError): a dtype the op does not take
  * DeviceError: tensors on different devices, or on one without kernels
  * UnsupportedError (a NotImplementedError): what batchproof has no batch-invariant form of
  * NotInvariantError: something whose invariance cannot be vouched for

  * ModeError: the switch was given, or left in, an impossible state
  * RecordError (a ValueError): a malformed prompt or answer record
"""

__all__ = [
    "ArgumentError",
    "BatchproofError",
    "DeviceError",
    "DtypeError",
    "LayoutError",
    "ModeError",
    "NotInvariantError",
    "RecordError",
    "ShapeError",
    "UnsupportedError",
]


class BatchproofError(Exception):
    """The base of every exception batchproof raises on purpose."""


class ArgumentError(BatchproofError, ValueError):
    """An argument's value is not one the function takes."""


class ShapeError(ArgumentError):
    """A tensor has the wrong shape."""


class LayoutError(ArgumentError):
    """Tensors overlap in memory, or a tensor cannot be written in place."""


class DtypeError(BatchproofError, TypeError):
    """A tensor has a dtype the op does not take."""


class DeviceError(BatchproofError):
    """Tensors are on different devices, or on a device without kernels."""


class UnsupportedError(BatchproofError, NotImplementedError):
    """There is no batch-invariant implementation of what was asked for."""


class NotInvariantError(BatchproofError):
    """The batch invariance of something cannot be vouched for."""


class ModeError(BatchproofError):
    """The switch was given a value it does not take, or is in a state that forbids the call."""


class RecordError(BatchproofError, ValueError):
    """A prompt or answer record is malformed."""
