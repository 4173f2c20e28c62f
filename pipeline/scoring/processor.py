"""Order of the steps from a poll of records to saved states; this order is the guarantee.

    decode → load → drop applied → rounds → features → GRU → decide → publish → save → reply → ack

Scores are published before states are saved. States are saved before offsets are acknowledged.
A partition's states and its watermark are saved together, by a conditional write. So after a
crash at any moment, three things hold. Each partition's states are exactly its log up to its
watermark. The scores topic holds all published scores past it. Committed offsets are never past
it.

With exactly-once processing, scores and offsets are committed together, before states are saved.
After a crash the committed offset may then be past the watermark. The worker reads the log back
to the watermark and keeps all published scores.

:class:`pipeline.scoring.computer.PollComputer` runs the steps up to decide,
:class:`pipeline.scoring.writer.PollWriter` those from publish on. A worker computes a poll while
it concludes the one before. States that are computed but not saved stay in memory
(:class:`pipeline.scoring.owned_partition.OwnedPartition`). They are dropped with the partition if
a save finds another watermark.
"""

from __future__ import annotations

from pipeline.kafka.polls import Poll
from pipeline.messages.decision import DecisionThresholds
from pipeline.scoring.computer import PollComputer
from pipeline.scoring.stages import ComputedPoll
from pipeline.scoring.writer import PollWriter
from pipeline.tracing.polls import PollTracer


class Processor:
    """The two halves of processing, each one poll at a time.

    Args:
        computer, writer: the halves.
        tracer: records spans of polls; None to record none.
    """

    def __init__(
        self, computer: PollComputer, writer: PollWriter, tracer: PollTracer | None = None
    ) -> None:
        self._computer = computer
        self._writer = writer
        self._tracer = tracer

    @property
    def thresholds(self) -> DecisionThresholds:
        """The thresholds of the next micro-batch's decisions."""
        return self._computer.thresholds

    def use(self, thresholds: DecisionThresholds) -> None:
        """Decide by these thresholds from the next micro-batch on."""
        self._computer.use(thresholds)

    async def process(self, poll: Poll) -> None:
        """Compute and conclude a poll; the errors are those of both."""
        await self.conclude(await self.compute(poll))

    async def compute(self, poll: Poll) -> ComputedPoll:
        """Run the steps from decode to decide. Call it for one poll at a time, in order.

        Raises:
            ScorerBrokenError: the computation fails for everything.
            StartupError: states and log do not belong together.
        """
        if self._tracer is None:
            return await self._computer.compute(poll)
        self._tracer.begin(poll)
        try:
            computed = await self._computer.compute(poll)
        except BaseException as error:
            self._tracer.end(poll, error)
            raise
        self._tracer.computed(poll)
        return computed

    async def conclude(self, computed: ComputedPoll) -> None:
        """Run the steps publish, save and ack. Call it for one poll at a time, in order.

        When it returns, ``poll.applied`` may be committed. That stays empty if scores and offsets
        were committed together.

        Raises:
            PublishError: the broker rejects a record that must be published.
            StartupError: states and log do not belong together.
        """
        if self._tracer is None:
            await self._writer.conclude(computed)
            return
        self._tracer.conclude(computed.poll)
        try:
            await self._writer.conclude(computed)
        except BaseException as error:
            self._tracer.end(computed.poll, error)
            raise
        self._tracer.end(computed.poll)
