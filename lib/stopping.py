"""How a run is stopped: by Ctrl-C, SIGTERM, or SIGUSR1, which SLURM can send some time before it ends a job.

What stands on disk is whole at every moment, because a run may be killed at any. So a process may leave wherever it is,
and needs no clean-up. It is asked to wait only inside a training step, whose work would be lost.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from tqdm import tqdm

from common import last_words, rank

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

# A launcher may send a signal to each process that the process has also got from elsewhere. What arrives within so many
# seconds of the first signal is taken for its copy.
COPY_SECONDS = 1.0


def signal_name(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


class Stopping:
    """Inside its `with` block a signal ends this process with exit status 128 + the signal's number.

    At first the process leaves at once and says `kept`, the half of a sentence that tells what is not lost. When
    `patient` is set to True, the first signal is only noted in `number` (0 before), for the caller to act upon. A second
    Ctrl-C then leaves at once. A second SIGTERM does not, because SLURM and torchrun may both send one; but one that
    comes from torchrun after a Ctrl-C does, because that is what torchrun makes of the second Ctrl-C.

    A thread waits for the signals. Python runs a signal handler only between two steps of the main thread's program,
    and the main thread may be waiting in a collective for a process that never answers.

    Does nothing outside the main thread, where Python does not allow it, nor for signals that were ignored before, as
    nohup and background jobs of a shell ignore Ctrl-C.
    """

    def __init__(self, kept: str):
        self.kept = kept
        self.number = 0
        self.patient = False
        self._handlers: dict[int, object] = {}
        self._writer: int | None = None

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():
            reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)  # as set_wakeup_fd asks
            self._wakeup = signal.set_wakeup_fd(self._writer)  # Python writes the number of every signal there
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._handlers[number] = signal.signal(number, lambda *_: None)
            threading.Thread(target=self._listen, args=(reader,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        if self._writer is not None:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._writer)  # which ends the thread

    def _listen(self, reader: int) -> None:
        while received := os.read(reader, 1):
            if received[0] in self._handlers:
                self._receive(received[0])
        os.close(reader)

    def _receive(self, number: int) -> None:
        if not self.number:
            self.number, self._since = number, time.monotonic()
            if not self.patient:
                self._leave(f"stopped by {signal_name(number)}; {self.kept}")
            if rank() == 0:
                tqdm.write(f"{signal_name(number)}: this step is finished and saved first; Ctrl-C now leaves at once")
        elif self.patient and time.monotonic() - self._since > COPY_SECONDS:
            from_torchrun = self.number == signal.SIGINT and "TORCHELASTIC_RUN_ID" in os.environ
            if number == signal.SIGINT or (number == signal.SIGTERM and from_torchrun):
                self._leave(f"stopped at once by a second Ctrl-C; {self.kept}")

    def _leave(self, sentence: str) -> None:
        if rank() == 0:
            sys.stdout.flush()
            print(file=sys.stderr)  # a progress bar may stand on the line
            last_words(sentence)
        os._exit(128 + self.number)
