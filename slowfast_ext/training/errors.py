"""Why a run stops."""


class TrainingError(RuntimeError):
    """The run cannot go on; the newest checkpoint is as sound as before."""


class NotFiniteError(RuntimeError):
    """The loss or a gradient is not a finite number.

    Attributes:
        what, value: the quantity and what it was.
        back: updates or batches between that one and the end of the window, 0 for the last.
    """

    def __init__(self, what: str, value: float, back: int):
        super().__init__(f"the {what} must be finite, got {value}")
        self.what, self.value, self.back = what, value, back
