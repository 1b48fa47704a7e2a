/* A disk that stops answering, for LD_PRELOAD: once the file STALL_ON exists, whoever opens a path
   that contains STALL_PART for STALL_FOR ("r" or "w") waits until it is gone, and leaves STALL_MARK. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void stall(const char *path, int flags) {
  const char *part = getenv("STALL_PART"), *on = getenv("STALL_ON"), *mark = getenv("STALL_MARK");
  if (!part || !on || !mark || !strstr(path, part)) return;
  if (((flags & O_ACCMODE) == O_RDONLY) != (getenv("STALL_FOR")[0] == 'r')) return;
  if (access(on, F_OK)) return;
  int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, "open");
  close(real(mark, O_CREAT | O_WRONLY, 0644));
  while (!access(on, F_OK)) usleep(50000);
}

#define OPEN(name)                                                     \
  int name(const char *path, int flags, ...) {                         \
    va_list rest;                                                      \
    va_start(rest, flags);                                             \
    int mode = va_arg(rest, int);                                      \
    va_end(rest);                                                      \
    stall(path, flags);                                                \
    int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, #name);     \
    return real(path, flags, mode);                                    \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                   \
  int name(int folder, const char *path, int flags, ...) {             \
    va_list rest;                                                      \
    va_start(rest, flags);                                             \
    int mode = va_arg(rest, int);                                      \
    va_end(rest);                                                      \
    stall(path, flags);                                                \
    int (*real)(int, const char *, int, ...) = dlsym(RTLD_NEXT, #name); \
    return real(folder, path, flags, mode);                            \
  }
OPENAT(openat)
OPENAT(openat64)
