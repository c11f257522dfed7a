/* One load generator for every server that answers each request with exactly one line.
 *
 * Called as `generator NAME=VALUE ...`; bench/generator.py says what the names mean. It prints one
 * JSON object. A closed loop keeps `in_flight` requests under way on each connection; an open loop
 * (rate > 0) sends request k when it is due, at start + k / rate, and counts its latency from then:
 * a server that stalls is charged for every request that it kept from being sent in time.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { PIDS_MAX = 64, EVENTS_MAX = 512, READ_BYTES = 1 << 16, PACE = 512, OPEN_MAX = 1024 };
#define SECOND 1000000000ull
/* How long the replies to what was due may take after the end; then they count as unanswered. */
#define GRACE (5 * SECOND)
/* A sleep shorter than this ends too late. */
#define SHORTEST_SLEEP 60000ull
#define LONGEST_SLEEP 10000000ull

struct text {
  const char *bytes;
  size_t size;
};

struct connection {
  int fd;
  unsigned outstanding; /* requests sent and not answered */
  size_t turn;          /* the text that is sent next */
  bool inside_line;
  char *unsent;
  size_t unsent_size;
  uint64_t *due; /* a ring: when the outstanding requests were due */
  unsigned oldest;
};

static struct text *texts;
static size_t text_count, text_bytes_max;
static struct connection *connections;
static unsigned connection_count, in_flight, burst, active, ring_size, cursor;
static bool rotates, keeps_latencies;
static char expected;
static double rate;
static int poller;
static pid_t pids[PIDS_MAX];
static unsigned pid_count;
static char *composed;

static uint64_t warm, length, warm_replies; /* how long to warm up, and to measure */
static uint64_t start, asked, stopped, now, window_begin = UINT64_MAX, window_end = UINT64_MAX;
static uint64_t replies, unexpected, window_replies;
static double window_cpu;
static bool is_window_open;
static uint64_t *latencies, latency_count, latency_room;

static void die(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vfprintf(stderr, format, arguments);
  fputc('\n', stderr);
  exit(1);
}

static uint64_t clock_now(void) {
  struct timespec at;
  clock_gettime(CLOCK_MONOTONIC, &at);
  return at.tv_sec * SECOND + at.tv_nsec;
}

/* User and system time of the servers' processes, to the nanosecond. */
static double cpu_seconds(void) {
  double sum = 0;
  for (unsigned i = 0; i < pid_count; i++) {
    clockid_t clock;
    struct timespec spent;
    if (clock_getcpuclockid(pids[i], &clock) || clock_gettime(clock, &spent))
      die("no CPU clock of process %d", (int)pids[i]);
    sum += spent.tv_sec + spent.tv_nsec / 1e9;
  }
  return sum;
}

static const char *argument(char **argv, const char *name) {
  size_t size = strlen(name);
  for (char **at = argv + 1; *at; at++)
    if (!strncmp(*at, name, size) && (*at)[size] == '=') return *at + size + 1;
  die("%s= is missing", name);
  return NULL;
}

static double number(char **argv, const char *name) { return atof(argument(argv, name)); }

/* The file holds each request with a zero byte after it. */
static void read_texts(const char *path) {
  FILE *file = fopen(path, "rb");
  if (!file) die("%s: %s", path, strerror(errno));
  fseek(file, 0, SEEK_END);
  size_t size = ftell(file);
  rewind(file);
  char *all = malloc(size);
  if (fread(all, 1, size, file) != size) die("%s: cut short", path);
  fclose(file);
  for (size_t i = 0; i < size; i++) text_count += !all[i];
  texts = calloc(text_count, sizeof *texts);
  char *at = all;
  for (size_t i = 0; i < text_count; i++) {
    texts[i] = (struct text){at, strlen(at)};
    if (texts[i].size > text_bytes_max) text_bytes_max = texts[i].size;
    at += texts[i].size + 1;
  }
}

static void watch(struct connection *c, uint32_t events, int operation) {
  struct epoll_event event = {.events = events, .data.u32 = c - connections};
  if (epoll_ctl(poller, operation, c->fd, &event)) die("epoll: %s", strerror(errno));
}

static void push(struct connection *c, const char *bytes, size_t size) {
  ssize_t sent = c->unsent_size ? 0 : send(c->fd, bytes, size, MSG_NOSIGNAL);
  if (sent < 0 && errno != EAGAIN) die("the server closed a connection: %s", strerror(errno));
  if (sent < 0) sent = 0;
  if ((size_t)sent == size) return;
  size_t rest = size - sent;
  c->unsent = realloc(c->unsent, c->unsent_size + rest);
  memcpy(c->unsent + c->unsent_size, bytes + sent, rest);
  if (!c->unsent_size) watch(c, EPOLLIN | EPOLLOUT, EPOLL_CTL_MOD);
  c->unsent_size += rest;
}

static void push_unsent(struct connection *c) {
  ssize_t sent = send(c->fd, c->unsent, c->unsent_size, MSG_NOSIGNAL);
  if (sent < 0 && errno != EAGAIN) die("the server closed a connection: %s", strerror(errno));
  if (sent <= 0) return;
  c->unsent_size -= sent;
  memmove(c->unsent, c->unsent + sent, c->unsent_size);
  if (!c->unsent_size) watch(c, EPOLLIN, EPOLL_CTL_MOD);
}

static void ask(struct connection *c, unsigned count, uint64_t due) {
  char *end = composed;
  for (unsigned i = 0; i < count; i++) {
    struct text *text = &texts[c->turn];
    memcpy(end, text->bytes, text->size);
    end += text->size;
    if (rotates && ++c->turn == text_count) c->turn = 0;
    if (keeps_latencies) c->due[(c->oldest + c->outstanding + i) % ring_size] = due;
  }
  c->outstanding += count;
  push(c, composed, end - composed);
}

static void ask_anybody_idle(void) {
  do cursor = (cursor + 1) % connection_count;
  while (connections[cursor].outstanding);
  ask(&connections[cursor], burst, now);
}

static void answered(struct connection *c) {
  uint64_t due = c->due[c->oldest];
  c->oldest = (c->oldest + 1) % ring_size;
  if (due < window_begin || due >= window_end) return;
  if (latency_count == latency_room) {
    latency_room = latency_room ? 2 * latency_room : 1 << 16;
    latencies = realloc(latencies, latency_room * sizeof *latencies);
  }
  latencies[latency_count++] = now - due;
}

static unsigned count_lines(struct connection *c, const char *at, size_t size) {
  unsigned lines = 0;
  for (const char *end = at + size; at < end; lines++) {
    const char *newline = memchr(at, '\n', end - at);
    if (!c->inside_line && *at != expected && !unexpected++)
      fprintf(stderr, "%.*s\n", (int)((newline ? newline : end) - at), at);
    c->inside_line = !newline;
    if (!newline) break;
    at = newline + 1;
  }
  return lines;
}

static void hear(struct connection *c) {
  static char bytes[READ_BYTES];
  ssize_t size = recv(c->fd, bytes, sizeof bytes, 0);
  if (size < 0 && errno == EAGAIN) return;
  if (size <= 0) die("the server closed a connection: %s", size ? strerror(errno) : "end of file");
  unsigned lines = count_lines(c, bytes, size);
  if (lines > c->outstanding) die("more replies than requests");
  if (keeps_latencies) now = clock_now();
  for (unsigned i = 0; keeps_latencies && i < lines; i++) answered(c);
  c->outstanding -= lines;
  replies += lines;
  if (rate) return;
  if (active < connection_count) {
    if (lines && !c->outstanding) ask_anybody_idle();
    return;
  }
  while (c->outstanding + burst <= in_flight) ask(c, burst, now);
}

static void connect_all(unsigned port) {
  struct sockaddr_in place = {.sin_family = AF_INET, .sin_port = htons(port)};
  place.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  connections = calloc(connection_count, sizeof *connections);
  for (unsigned i = 0; i < connection_count; i++) {
    struct connection *c = &connections[i];
    int on = 1;
    c->fd = socket(AF_INET, SOCK_STREAM, 0);
    if (c->fd < 0 || connect(c->fd, (struct sockaddr *)&place, sizeof place))
      die("no connection %u to port %u: %s", i, port, strerror(errno));
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    /* Rotating ones begin spread over all texts, the others keep one each. */
    c->turn = rotates ? (uint64_t)i * text_count / connection_count : i % text_count;
    c->due = keeps_latencies ? calloc(ring_size, sizeof *c->due) : NULL;
    if (i % PACE == PACE - 1) { /* Once this is answered, no backlog is left to overflow. */
      char byte = 0;
      ask(c, 1, 0);
      while (byte != '\n')
        if (recv(c->fd, &byte, 1, 0) <= 0) die("the server closed a new connection");
      c->outstanding = 0;
    }
    fcntl(c->fd, F_SETFL, O_NONBLOCK);
    watch(c, EPOLLIN, EPOLL_CTL_ADD);
  }
}

/* Wait for replies, at most until then, or a while if that is far away. */
static void attend(uint64_t until) {
  struct epoll_event events[EVENTS_MAX];
  if (rate && until > now + SHORTEST_SLEEP) {
    uint64_t nap = until - now < LONGEST_SLEEP ? until - now : LONGEST_SLEEP;
    struct timespec timeout = {.tv_nsec = nap - SHORTEST_SLEEP / 2};
    struct pollfd any = {.fd = poller, .events = POLLIN};
    ppoll(&any, 1, &timeout, NULL);
  }
  int count = epoll_wait(poller, events, EVENTS_MAX, rate ? 0 : LONGEST_SLEEP / 1000000);
  for (int i = 0; i < count; i++) {
    struct connection *c = &connections[events[i].data.u32];
    if (events[i].events & EPOLLOUT) push_unsent(c);
    if (events[i].events & ~EPOLLOUT) hear(c);
  }
  now = clock_now();
}

static bool is_anything_outstanding(void) {
  for (unsigned i = 0; i < connection_count; i++)
    if (connections[i].outstanding) return true;
  return false;
}

static void configure(char **argv) {
  connection_count = number(argv, "connections");
  in_flight = number(argv, "in_flight");
  burst = number(argv, "burst");
  active = number(argv, "active");
  rotates = number(argv, "rotates");
  rate = number(argv, "rate");
  warm_replies = number(argv, "warm_requests");
  warm = number(argv, "warm_seconds") * SECOND;
  length = number(argv, "seconds") * SECOND;
  expected = *argument(argv, "expected");
  keeps_latencies = *argument(argv, "latencies");
  ring_size = rate ? OPEN_MAX : in_flight;
  char *list = strdup(argument(argv, "pids"));
  for (char *pid = strtok(list, ","); pid && pid_count < PIDS_MAX; pid = strtok(NULL, ","))
    pids[pid_count++] = atoi(pid);
  read_texts(argument(argv, "requests"));
  composed = malloc(burst * text_bytes_max);
  poller = epoll_create1(0);
}

static uint64_t due_at(uint64_t request) { return start + (uint64_t)(request * 1e9 / rate); }

/* Send what is due by then. A full connection holds up the schedule; latencies grow meanwhile. */
static void ask_what_is_due(uint64_t by) {
  for (; due_at(asked) <= by; asked++) {
    struct connection *c = &connections[asked % connection_count];
    if (c->outstanding == ring_size) return;
    ask(c, 1, due_at(asked));
  }
}

static void open_window_once_warm(void) {
  if (is_window_open || now < start + warm || replies < warm_replies) return;
  is_window_open = true;
  if (!rate) window_begin = now;
  window_end = window_begin + length;
  window_cpu = cpu_seconds();
  window_replies = replies;
}

static void run(void) {
  start = now = clock_now();
  if (rate) window_begin = start + warm;
  for (unsigned i = 0; !rate && i < active; i++)
    for (unsigned n = 0; n < in_flight; n += burst) ask(&connections[i], burst, now);
  cursor = active - 1;
  while (now < window_end) {
    if (rate) ask_what_is_due(now);
    attend(rate && due_at(asked) > now ? due_at(asked) : now + LONGEST_SLEEP);
    open_window_once_warm();
  }
  stopped = now;
  window_cpu = cpu_seconds() - window_cpu;
  window_replies = replies - window_replies;
}

/* Hear the late replies; how many of the requests that were due never got one. */
static uint64_t finish(void) {
  uint64_t unanswered = 0;
  if (!rate) return 0;
  ask_what_is_due(window_end - 1);
  while (is_anything_outstanding() && now < stopped + GRACE) attend(now + SECOND / 1000);
  for (unsigned i = 0; i < connection_count; i++) unanswered += connections[i].outstanding;
  for (; due_at(asked) < window_end; asked++) unanswered++;
  return unanswered;
}

static void write_latencies(const char *path) {
  FILE *file = fopen(path, "wb");
  if (!file || fwrite(latencies, sizeof *latencies, latency_count, file) != latency_count)
    die("%s: %s", path, strerror(errno));
  fclose(file);
}

int main(int argc, char **argv) {
  (void)argc;
  configure(argv);
  connect_all(number(argv, "port"));
  run();
  unsigned long long unanswered = finish();
  if (keeps_latencies) write_latencies(argument(argv, "latencies"));
  printf("{\"requests\": %llu, \"seconds\": %.9f, \"cpu_seconds\": %.9f, "
         "\"unexpected\": %llu, \"unanswered\": %llu}\n",
         (unsigned long long)window_replies, (stopped - window_begin) / 1e9, window_cpu,
         (unsigned long long)unexpected, unanswered);
  return 0;
}
