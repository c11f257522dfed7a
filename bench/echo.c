/* The least that a server on epoll can do: send back what came. Prints the port that it took. */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { BACKLOG = 4096, EVENTS_MAX = 512, READ_BYTES = 1 << 16 };

static int watch(int poller, int fd) {
  struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
  return epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event);
}

/* What the socket does not take at once it waits for: clients here read all that they asked for. */
static int echo(int fd) {
  static char bytes[READ_BYTES];
  ssize_t size = recv(fd, bytes, sizeof bytes, 0);
  for (ssize_t sent = 0, now; sent < size; sent += now)
    if ((now = send(fd, bytes + sent, size - sent, MSG_NOSIGNAL)) < 0) return -1;
  return size > 0 ? 0 : -1;
}

int main(void) {
  struct sockaddr_in place = {.sin_family = AF_INET};
  socklen_t size = sizeof place;
  int on = 1, listener = socket(AF_INET, SOCK_STREAM, 0), poller = epoll_create1(0);
  place.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (bind(listener, (struct sockaddr *)&place, sizeof place) || listen(listener, BACKLOG) ||
      getsockname(listener, (struct sockaddr *)&place, &size) || watch(poller, listener)) {
    perror("echo");
    return 1;
  }
  printf("%d\n", ntohs(place.sin_port));
  fflush(stdout);
  for (;;) {
    struct epoll_event events[EVENTS_MAX];
    int count = epoll_wait(poller, events, EVENTS_MAX, -1);
    for (int i = 0; i < count; i++) {
      int fd = events[i].data.fd;
      if (fd != listener) {
        if (echo(fd)) close(fd);
        continue;
      }
      if ((fd = accept(listener, NULL, NULL)) < 0) continue;
      setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
      if (watch(poller, fd)) close(fd);
    }
  }
}
