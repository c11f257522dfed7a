"""One conversation with one client: bytes in, bytes out, no I/O.

A lane (whatever moves the bytes: a stream, a sweep over ready sockets, a test) does this:

    session.receive(data)            b"" says that the client will send no more
    while True:
        send(session.advance())      replies to all that can be answered now
        if session.waiting:          an ALLOC whose pool is empty, or a STATS that needs others
            session.resolve(first)   … the IDs came, or
            session.describe(rows)   … the measured values did, or
            session.reject(error)    … they did not
        elif session.finished:       close
        elif not session.has_work:   receive again

Replies leave in the order of their requests. `advance` stops at `REPLY_BYTES_GOAL`, so neither
a flood of short requests nor a reader that never reads makes us hold more than that: a lane
reads on only after it has sent.
"""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Final, final

import attrs

from idalloc_tcp.errors import BadSyntax, Denied, Draining, IdallocError, Unavailable
from idalloc_tcp.metrics import Metrics, Row
from idalloc_tcp.protocol import (
    HELP_LINES,
    LINE_BYTES_MAX,
    PROTOCOL,
    Alloc,
    Auth,
    Hello,
    LineReader,
    Ping,
    Quit,
    Request,
    RequestParser,
    Stats,
    block,
    ending_of,
    err,
    looks_like_http,
    ok,
    random,
    stat,
)

#: What a lane receives at once. Together with the next this bounds a connection's memory, and how
#: long it can keep others waiting.
RECEIVE_BYTES: Final = 4_096
#: `advance` begins no further reply once it has this many bytes of them.
REPLY_BYTES_GOAL: Final = 8_192

#: The first of `count` IDs of a service, or None: not without waiting. Raises IdallocError.
Take = Callable[[str, int], int | None]
#: The first of `count` IDs that stand in for a service's when no store answers, or None.
Fallback = Callable[[str, int], int | None]
#: The measured values of the server (None) or of one service; or None: not without waiting.
Report = Callable[[str | None], Iterable[Row] | None]


def no_fallback(_service: str, _count: int) -> int | None:
    """An error it is."""
    return None


def _described(rows: Iterable[Row], line: bytes) -> bytes:
    end = ending_of(line)
    return end.join(block([stat(name, value) for name, value in rows])) + end


def _refuse_draining(_service: str, _count: int) -> int | None:
    raise Draining("the server is stopping; connect again")


@final
@attrs.frozen
class Traced:
    """A request with a trace that was answered.

    Attributes:
        reply: without its end.
        has_waited: were its IDs not there at once?
    """

    request: Alloc
    reply: bytes
    has_waited: bool

    @property
    def is_served(self) -> bool:
        """Did it get IDs of the service?"""
        return self.reply.startswith(b"OK")


@final
@attrs.define(eq=False)
class Session:
    """The state of one conversation.

    Args:
        parser: shared by all sessions of a server.
        take: where IDs come from.
        report: what STATS answers.
        metrics: counts requests, IDs and errors.
        fallback: what stands in for IDs that are unavailable.
    """

    _parser: RequestParser
    _take: Take
    _report: Report
    _metrics: Metrics
    _fallback: Fallback = no_fallback
    #: Is there nothing to do until the client sends more, and no line begun?
    is_at_rest: bool = attrs.field(init=False, default=True)
    #: The request that must wait for its answer. Nothing after it is answered before.
    waiting: Alloc | Stats | None = attrs.field(init=False, default=None)
    #: Close once the replies are sent; whatever else the client sent is not executed.
    finished: bool = attrs.field(init=False, default=False)
    #: Requests with a trace that were answered, until the lane takes note of them.
    traced: tuple[Traced, ...] = attrs.field(init=False, default=())
    _reader: LineReader = attrs.field(init=False, factory=LineReader)
    _lines: deque[bytes] = attrs.field(init=False, factory=deque)
    _settled: bytes = attrs.field(init=False, default=b"")
    _waiting_line: bytes = attrs.field(init=False, default=b"")
    _ended: bool = attrs.field(init=False, default=False)
    _draining: bool = attrs.field(init=False, default=False)

    def receive(self, data: bytes) -> None:
        """Take in what the client sent; b"" says that it will send no more."""
        self.is_at_rest = False
        if self._draining:
            self._take = _refuse_draining
        if data:
            self._lines.extend(self._reader.feed(data))
            return
        self._ended = True
        # A last line without its LF may have been cut short, so it is never executed. One
        # that is over-long already gets its error all the same.
        if len(self._reader.unfinished) > LINE_BYTES_MAX:
            self._lines.append(self._reader.unfinished)

    def drain(self) -> None:
        """Refuse every ALLOC received from now on; what has arrived is still served."""
        self._draining = True

    @property
    def has_work(self) -> bool:
        """Would `advance` do anything?"""
        may_answer = self.waiting is None and not self.finished
        return bool(self._settled or (self._lines and may_answer))

    @property
    def is_mid_line(self) -> bool:
        """Has the client begun a line that it has not finished?"""
        return bool(self._reader.unfinished)

    def advance(self) -> bytes:
        """The replies to all that can be answered now, up to about `REPLY_BYTES_GOAL`."""
        replies = [self._settled]
        room = REPLY_BYTES_GOAL - len(self._settled)
        self._settled = b""
        lines = self._lines
        try:
            while lines and room > 0 and self.waiting is None and not self.finished:
                reply = self._answer(lines.popleft())
                room -= len(reply)
                replies.append(reply)
        except BaseException:
            self._settled = b"".join(replies)  # For `abort`: these requests were served.
            raise
        if self._ended and not lines and self.waiting is None:
            self.finished = True
        unfinished = lines or self.waiting or self.finished or self._reader.unfinished
        self.is_at_rest = not unfinished
        return b"".join(replies)

    def take_traced(self) -> tuple[Traced, ...]:
        """What was answered to requests with a trace since the last time."""
        traced, self.traced = self.traced, ()
        return traced

    def put_back(self, replies: bytes) -> None:
        """Have these sent first: the lane could not send what `advance` gave it."""
        self._settled = replies + self._settled
        self.is_at_rest = self.is_at_rest and not replies

    def resolve(self, first: int) -> None:
        """The IDs that `waiting` asked for begin at `first`."""
        request = self._stop_waiting()
        assert isinstance(request, Alloc), "no IDs were asked for"
        reply = self._serve(request, first, has_waited=True)
        self._settled = reply + ending_of(self._waiting_line)

    def describe(self, rows: Iterable[Row]) -> None:
        """These are the measured values that `waiting` asked for."""
        self._stop_waiting()
        self._settled = _described(rows, self._waiting_line)

    def reject(self, error: IdallocError) -> None:
        """What `waiting` asked for is not to be had."""
        request = self._stop_waiting()
        if isinstance(request, Alloc):
            reply = self._refuse_alloc(request, error, has_waited=True)
        else:
            reply = self._refuse(error)
        self._settled = reply + ending_of(self._waiting_line)

    def abort(self, error: IdallocError) -> bytes:
        """Give up on this client: what to send it last."""
        self.finished = True
        replies, self._settled = self._settled, b""
        return replies + self._refuse(error) + b"\n"

    def _stop_waiting(self) -> Alloc | Stats:
        request = self.waiting
        assert request is not None, "no request is waiting"
        self.waiting = None
        return request

    def _answer(self, line: bytes) -> bytes:
        """The whole reply to one line; b"" if it must wait."""
        self._metrics.requests_total += 1
        try:
            request = self._parser.parse(line)
            if type(request) is Alloc:
                return self._answer_alloc(request, line)
            if type(request) is Stats:
                return self._answer_stats(request, line)
            reply = ending_of(line).join(self._dispatch(request))
        except IdallocError as error:
            reply = self._refuse(self._guard_http(line, error))
        return reply + ending_of(line)

    def _answer_alloc(self, request: Alloc, line: bytes) -> bytes:
        try:
            first = self._take(request.service, request.count)
        except IdallocError as error:
            return self._refuse_alloc(request, error) + ending_of(line)
        if first is None:
            return self._begin_waiting(request, line)
        return self._serve(request, first) + ending_of(line)

    def _answer_stats(self, request: Stats, line: bytes) -> bytes:
        rows = self._report(request.service)
        return self._begin_waiting(request, line) if rows is None else _described(rows, line)

    def _begin_waiting(self, request: Alloc | Stats, line: bytes) -> bytes:
        self.is_at_rest = False
        self.waiting, self._waiting_line = request, line
        self._metrics.waits_total += isinstance(request, Alloc)
        return b""

    def _refuse_alloc(
        self, request: Alloc, error: IdallocError, *, has_waited: bool = False
    ) -> bytes:
        first = None
        if isinstance(error, Unavailable):
            first = self._fallback(request.service, request.count)
        if first is None:
            reply = self._refuse(error)
        else:
            self._metrics.random_total += 1
            reply = random(first, request)
        return self._trace(request, reply, has_waited)

    def _serve(self, request: Alloc, first: int, *, has_waited: bool = False) -> bytes:
        self._metrics.ids_total += request.count
        if not request.trace:
            return b"OK %d %d" % (first, request.count)
        reply = ok(first, request.count, request.trace)
        return self._trace(request, reply, has_waited)

    def _trace(self, request: Alloc, reply: bytes, has_waited: bool) -> bytes:
        if request.trace:
            self.traced += (Traced(request, reply, has_waited),)
        return reply

    def _refuse(self, error: IdallocError) -> bytes:
        self._metrics.errors_total[error.code] += 1
        return err(error)

    def _guard_http(self, line: bytes, error: IdallocError) -> IdallocError:
        """Stray HTTP is told once and closed, so that no line of its body is executed."""
        if not looks_like_http(line):
            return error
        self.finished = True
        return BadSyntax(f"this server speaks {PROTOCOL}, not HTTP; closing")

    def _dispatch(self, request: Request) -> list[bytes]:
        """The lines that answer what never has to wait."""
        match request:
            case Ping():
                return [ok("PONG")]
            case Hello():
                limits = (f"line={LINE_BYTES_MAX}", f"count={self._parser.max_count}")
                return [ok(PROTOCOL, *limits)]
            case Auth():
                raise Denied("no tokens are configured on this server")
            case Quit():
                self.finished = True
                return [ok()]
            case _:
                return block([line.encode("ascii") for line in HELP_LINES])
