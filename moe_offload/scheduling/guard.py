"""Never slower than static: the dynamic policy is measured against a frozen cache, and the faster one is used.

Dynamic caches can lose to a placement that is left alone (misses on the CPU, no transfers). Which of the two wins
depends on the number of tokens, so each bucket of tokens has a verdict of its own. One mode is in use; from time to
time a short run of steps tries the other. Such a trial ends as soon as its outcome is clear, and the time that it cost
decides how long it takes until the next: all trials together cost about one percent. Step times move with the
context's length and with whatever else the machine does, so a trial is compared with the steps just before it, as a
ratio, and ratios of several trials are pooled as long as they agree.
"""

import math
from collections import deque
from dataclasses import dataclass
from statistics import median, median_high, median_low
from typing import Literal

Mode = Literal["dynamic", "static"]

BUCKETS = (1, 2, 5, 17, 65, 513)  # the fewest tokens of each bucket
_MARGIN = math.log(1.02)  # static has to be faster by this much to be taken
_WARM_UP = {"dynamic": 4, "static": 2}  # steps after a switch that are not counted: the cache adapts, copies run out
_FIRST = 6  # steps counted before the first trial
_LONGEST = 32  # steps counted in a trial whose outcome stays unclear
_RECENT = 32  # steps behind a median of the mode in use
_POOL = 64  # ratios of trials that are remembered
_SHARE = 0.012  # of the time, for trials
_NOISE = (0.02, 0.5)  # bounds of the relative noise that is believed
_CLEAR = 2.0  # standard errors
_CERTAIN = 4.0  # standard errors, where the question is asked at every step
_WAIT = (32, 2048)  # steps between trials
_AT_EASE = 256  # the fewest steps between trials after some with the same outcome
_HOPELESS = math.log(1.5)  # steps slower than this end most trials while they warm up
_PATIENT = 4  # every so many trials warm up to the end, however it looks
_DRIFT_STEPS = 8  # steps whose median tells that the mode in use has become slower
_DRIFT = math.log(1.1)  # by how much at least
_DRIFT_AGAIN = math.log(1.4)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the guard found for one bucket of tokens.

    tokens: fewest and most (0: no bound). The medians are seconds per step, per token where the bucket has no bound;
    None before anything was counted.
    """

    tokens: tuple[int, int]
    verdict: Literal["undecided", "dynamic", "static"]
    dynamic_seconds: float | None
    static_seconds: float | None
    dynamic_steps: int
    static_steps: int


class Guard:
    """Says in which mode a step runs, and is told how long it took."""

    def __init__(self) -> None:
        self._buckets = [_Bucket() for _ in BUCKETS]

    def mode(self, tokens: int) -> Mode:
        """How to run a step (a whole forward pass) of so many tokens."""
        return self._buckets[_bucket_of(tokens)].mode

    def record(self, tokens: int, mode: Mode, seconds: float) -> None:
        """A step took `seconds`. Steps in a mode that was not asked for are left out."""
        place = _bucket_of(tokens)
        bucket = self._buckets[place]
        if mode != bucket.mode or not 0 < seconds < math.inf:
            return
        # Where there is no upper bound, one prompt is many times another: seconds per token are what is comparable.
        bucket.record(seconds / tokens if place == len(BUCKETS) - 1 else seconds)

    def verdicts(self) -> tuple[Verdict, ...]:
        """One per bucket that had any step."""
        ends = (*(start - 1 for start in BUCKETS[1:]), 0)
        return tuple(
            bucket.verdict((start, end))
            for bucket, start, end in zip(self._buckets, BUCKETS, ends, strict=True)
            if any(bucket.steps.values())
        )


class _Bucket:
    """Two modes, one in use. Everything is in logarithms of seconds."""

    def __init__(self) -> None:
        self.used: Mode = "dynamic"
        self.steps: dict[Mode, int] = {"dynamic": 0, "static": 0}
        self._decided = False
        self._recent: dict[Mode, deque[float]] = {"dynamic": deque(maxlen=_RECENT), "static": deque(maxlen=_RECENT)}
        self._ratios: deque[float] = deque(maxlen=_POOL)  # the mode on trial over the mode in use
        self._trial: list[float] | None = None  # the ratios of the trial that runs
        self._warming: list[float] = []  # those of its steps that are not counted
        self._trials = 0  # since the mode in use was taken
        self._warm_up = _WARM_UP["dynamic"]
        self._wait = _FIRST
        self._usual = 0.0  # median of the mode in use, before the last trial
        self._noise = 0.0
        self._calm = 0.0  # median of the mode in use, around the last trial
        self._since = 0  # steps in use that were counted after the last trial
        self._alarmed = self._alarmed_before = False  # the mode in use became slower: now, before the last trial

    @property
    def mode(self) -> Mode:
        return self.used if self._trial is None else _other(self.used)

    def record(self, seconds: float) -> None:
        log = math.log(seconds)
        if self._trial is not None:
            self._try(self._trial, log)
        elif self._warm_up:
            self._warm_up -= 1
        else:
            self._recent[self.used].append(log)
            self.steps[self.used] += 1
            self._since += 1
            self._alarmed = self._since < self._wait and self._drifted()
            if self._since >= self._wait or self._alarmed:
                self._begin()

    def verdict(self, tokens: tuple[int, int]) -> Verdict:
        dynamic, static = (math.exp(median(recent)) if recent else None for recent in self._recent.values())
        found = self.used if self._decided else "undecided"
        return Verdict(tokens, found, dynamic, static, self.steps["dynamic"], self.steps["static"])

    def _try(self, trial: list[float], log: float) -> None:
        ratio = log - self._usual
        if self._warm_up:
            self._warm_up -= 1
            self._warming.append(ratio)
            # Slow at first means little where the cache has to adapt, but if it were always awaited, trials of a mode
            # that is far worse would cost so much that they became too rare to notice when it is not any more.
            if self._trials % _PATIENT and len(self._warming) > 1 and min(self._warming) > _HOPELESS:
                self._end(trial)
            return
        trial.append(ratio)
        self._recent[self.mode].append(log)
        self.steps[self.mode] += 1
        if self._is_clear(trial):
            self._end(trial)

    def _begin(self) -> None:
        recent = self._recent[self.used]
        if self._alarmed:  # what was before the change would be compared with otherwise
            for _ in range(len(recent) - _DRIFT_STEPS // 2):
                recent.popleft()
        self._usual = median_low(recent)
        if not self._alarmed:  # a few steps say little about noise
            spread = 1.48 * median(abs(log - self._usual) for log in recent)
            spread = min(max(spread, _NOISE[0]), _NOISE[1])
            self._noise = (self._noise + spread) / 2 if self._decided else spread
        self._trial = []
        self._warming = []
        self._warm_up = _WARM_UP[self.mode]

    def _error(self, counted: int) -> float:
        """The standard error of the difference between `counted` steps and the recent ones, by their medians."""
        return 1.25 * self._noise * math.sqrt(1 / counted + 1 / len(self._recent[self.used]))

    def _needed(self) -> float:
        """The logarithm of the ratio below which the mode on trial is taken."""
        return -_MARGIN if self.used == "dynamic" else 0.0

    def _is_clear(self, trial: list[float]) -> bool:
        if len(trial) < 2:
            return False
        if len(trial) >= _LONGEST:
            return True
        clear = _CLEAR * self._error(len(trial))  # the medians on the safe side: one hiccup is no evidence
        needed = self._needed()
        return median_low(trial) > needed + clear or median_high(trial) < needed - clear

    def _end(self, trial: list[float]) -> None:
        """The trial is over; `trial` is empty where it was given up while it warmed up, which teaches no ratio."""
        if trial:
            agree = self._ratios and abs(median(trial) - median(self._ratios)) < _CLEAR * self._error(len(trial))
            if not agree:
                self._ratios.clear()
            self._ratios.extend(trial)
        self._trials += 1
        self._calm = self._usual
        self._alarmed_before = self._alarmed
        ratios = self._warming + trial
        cost = len(ratios) * math.expm1(
            median_low(ratios)
        )  # in steps; without hiccups, which the other mode has as well
        if trial and median(self._ratios) < self._needed():
            cost = (_WARM_UP[self.used] + 2) * math.expm1(
                -median(self._ratios)
            )  # what trying this one again would cost
            self._take(_other(self.used))
        else:
            self._warm_up = _WARM_UP[self.used] // 2
        least = min(_WAIT[0] << self._trials, _AT_EASE)
        self._wait = min(max(math.ceil(cost / _SHARE), least), _WAIT[1])
        self._since = 0
        self._trial = None
        self._decided = True

    def _take(self, mode: Mode) -> None:
        self.used = mode
        self._ratios.clear()
        self._trials = 0
        self._warm_up = 0
        self._calm = median(self._recent[mode])
        self._alarmed_before = False

    def _drifted(self) -> bool:
        """Whether the mode in use has become slower since the last trial: then the other may be the faster one now.

        After a trial for this reason that changed nothing, it takes more to have another before its time.
        """
        if not self._decided or self._since < _DRIFT_STEPS:
            return False
        recent = self._recent[self.used]
        now = median_low(recent[-place] for place in range(1, _DRIFT_STEPS + 1))
        certain = _CERTAIN * 1.25 * self._noise * math.sqrt(1 / _DRIFT_STEPS + 1 / len(recent))
        return now - self._calm > max(certain, _DRIFT_AGAIN if self._alarmed_before else _DRIFT)


def _bucket_of(tokens: int) -> int:
    for place in range(len(BUCKETS) - 1, 0, -1):
        if tokens >= BUCKETS[place]:
            return place
    return 0


def _other(mode: Mode) -> Mode:
    return "static" if mode == "dynamic" else "dynamic"
