/* A library to preload: calls of the C library on files below one folder are counted, and one of them goes wrong.
 *
 *     cc -shared -fPIC -O2 -o failing_calls.so failing_calls.c -ldl
 *
 * Every wrapper has the signature of the call that it stands before. It asks `fault` whether the call is to fail; if
 * not, it makes the real call. A call counts if it names a path below the folder, or a descriptor that was opened
 * there. fuzz/fault_driver.py arms the library, and reads what was called, through the functions at the end.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum mode { OFF, COUNT, ONCE, FROM, KILL, SHORT, ROOM };

#define MOST_CALLS 65536
#define MOST_FILES 65536

static enum mode mode;
static char folder[4096];
static size_t folder_length;
static long chosen;   /* the call that goes wrong; with ROOM the bytes that the disk takes */
static int error;     /* the errno of a call that fails */
static atomic_long calls;
static const char *names[MOST_CALLS];
static atomic_uchar watched[MOST_FILES];

static int below(const char *path)
{
    return path && !strncmp(path, folder, folder_length) && (path[folder_length] == '/' || !path[folder_length]);
}

static int is_watched(int fd)
{
    return fd >= 0 && fd < MOST_FILES && watched[fd];
}

static int names_file(int at, const char *path)
{
    return path && path[0] == '/' ? below(path) : is_watched(at);
}

/* Count a call on a watched file. Return 1 if it is to fail, with errno set; 2 if it is to do half of its work. */
static int fault(int counts, const char *name)
{
    if (mode == OFF || !counts)
        return 0;
    long number = atomic_fetch_add(&calls, 1) + 1;
    if (number <= MOST_CALLS)
        names[number - 1] = name;
    if (mode == KILL && number == chosen)
        kill(getpid(), SIGKILL);
    if (mode == SHORT && number == chosen)
        return 2;
    if ((mode == ONCE && number == chosen) || (mode == FROM && number >= chosen)) {
        errno = error;
        return 1;
    }
    return 0;
}

/* How many bytes of a write are taken; -1 for none, with errno set. */
static ssize_t room(int fd, size_t size)
{
    if (mode != ROOM || !is_watched(fd))
        return (ssize_t)size;
    if (!size)
        return 0;
    if (chosen <= 0) {
        errno = ENOSPC;
        return -1;
    }
    ssize_t taken = (ssize_t)size < chosen ? (ssize_t)size : chosen;
    chosen -= taken;
    return taken;
}

static int opened(int fd, int counts)
{
    if (fd >= 0 && fd < MOST_FILES)
        watched[fd] = (unsigned char)counts;
    return fd;
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) \
        real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

#define OPEN(name) \
    int name(const char *path, int flags, ...) \
    { \
        va_list rest; \
        va_start(rest, flags); \
        mode_t permissions = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        REAL(int, name, const char *, int, ...); \
        if (fault(below(path), "open")) \
            return -1; \
        return opened(real(path, flags, permissions), below(path)); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int at, const char *path, int flags, ...) \
    { \
        va_list rest; \
        va_start(rest, flags); \
        mode_t permissions = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        REAL(int, name, int, const char *, int, ...); \
        if (fault(names_file(at, path), "openat")) \
            return -1; \
        return opened(real(at, path, flags, permissions), names_file(at, path)); \
    }
OPENAT(openat)
OPENAT(openat64)

int close(int fd)
{
    REAL(int, close, int);
    int counts = is_watched(fd), failed = fault(counts, "close");
    opened(fd, 0);
    int result = real(fd); /* it is closed, whatever is answered */
    if (failed == 1) {
        errno = error;
        return -1;
    }
    return result;
}

ssize_t write(int fd, const void *data, size_t size)
{
    REAL(ssize_t, write, int, const void *, size_t);
    int failed = fault(is_watched(fd), "write");
    if (failed == 1)
        return -1;
    ssize_t taken = room(fd, failed == 2 && size > 1 ? size / 2 : size);
    return taken < 0 ? -1 : real(fd, data, (size_t)taken);
}

#define PWRITE(name) \
    ssize_t name(int fd, const void *data, size_t size, off_t offset) \
    { \
        REAL(ssize_t, name, int, const void *, size_t, off_t); \
        int failed = fault(is_watched(fd), "pwrite"); \
        if (failed == 1) \
            return -1; \
        ssize_t taken = room(fd, failed == 2 && size > 1 ? size / 2 : size); \
        return taken < 0 ? -1 : real(fd, data, (size_t)taken, offset); \
    }
PWRITE(pwrite)
PWRITE(pwrite64)

ssize_t read(int fd, void *data, size_t size)
{
    REAL(ssize_t, read, int, void *, size_t);
    int failed = fault(is_watched(fd), "read");
    return failed == 1 ? -1 : real(fd, data, failed == 2 && size > 1 ? size / 2 : size);
}

#define PREAD(name) \
    ssize_t name(int fd, void *data, size_t size, off_t offset) \
    { \
        REAL(ssize_t, name, int, void *, size_t, off_t); \
        int failed = fault(is_watched(fd), "pread"); \
        return failed == 1 ? -1 : real(fd, data, failed == 2 && size > 1 ? size / 2 : size, offset); \
    }
PREAD(pread)
PREAD(pread64)

/* Calls that do their work or do not: the type, the name, what is counted, the parameters, the arguments. */
#define CALL(type, name, shown, counts, parameters, ...) \
    type name parameters \
    { \
        static type(*real) parameters; \
        if (!real) \
            real = (type(*) parameters)dlsym(RTLD_NEXT, #name); \
        return fault(counts, shown) == 1 ? (type)-1 : real(__VA_ARGS__); \
    }

CALL(int, fsync, "fsync", is_watched(fd), (int fd), fd)
CALL(int, fdatasync, "fdatasync", is_watched(fd), (int fd), fd)
CALL(int, ftruncate, "ftruncate", is_watched(fd), (int fd, off_t size), fd, size)
CALL(int, ftruncate64, "ftruncate", is_watched(fd), (int fd, off_t size), fd, size)
CALL(off_t, lseek, "lseek", is_watched(fd), (int fd, off_t offset, int whence), fd, offset, whence)
CALL(off_t, lseek64, "lseek", is_watched(fd), (int fd, off_t offset, int whence), fd, offset, whence)
CALL(int, flock, "flock", is_watched(fd), (int fd, int operation), fd, operation)
CALL(int, fstat, "fstat", is_watched(fd), (int fd, struct stat *found), fd, found)
CALL(int, fstat64, "fstat", is_watched(fd), (int fd, struct stat64 *found), fd, found)
CALL(int, stat, "stat", below(path), (const char *path, struct stat *found), path, found)
CALL(int, stat64, "stat", below(path), (const char *path, struct stat64 *found), path, found)
CALL(int, lstat, "lstat", below(path), (const char *path, struct stat *found), path, found)
CALL(int, lstat64, "lstat", below(path), (const char *path, struct stat64 *found), path, found)
CALL(int, mkdir, "mkdir", below(path), (const char *path, mode_t permissions), path, permissions)
CALL(int, rmdir, "rmdir", below(path), (const char *path), path)
CALL(int, unlink, "unlink", below(path), (const char *path), path)
CALL(int, unlinkat, "unlinkat", names_file(at, path), (int at, const char *path, int flags), at, path, flags)
CALL(int, rename, "rename", below(old) || below(new), (const char *old, const char *new), old, new)
CALL(int, renameat, "renameat", names_file(at, old) || names_file(to, new),
     (int at, const char *old, int to, const char *new), at, old, to, new)
CALL(int, renameat2, "renameat2", names_file(at, old) || names_file(to, new),
     (int at, const char *old, int to, const char *new, unsigned flags), at, old, to, new, flags)
CALL(void *, mmap, "mmap", is_watched(fd),
     (void *place, size_t size, int protection, int flags, int fd, off_t offset),
     place, size, protection, flags, fd, offset)
CALL(void *, mmap64, "mmap", is_watched(fd),
     (void *place, size_t size, int protection, int flags, int fd, off_t offset),
     place, size, protection, flags, fd, offset)

DIR *opendir(const char *path)
{
    REAL(DIR *, opendir, const char *);
    return fault(below(path), "opendir") == 1 ? NULL : real(path);
}

DIR *fdopendir(int fd)
{
    REAL(DIR *, fdopendir, int);
    return fault(is_watched(fd), "fdopendir") == 1 ? NULL : real(fd);
}

/* Choose what goes wrong from now on, on files below a folder; nothing was called yet. */
void faults_arm(const char *path, int how, long which, int number)
{
    strncpy(folder, path, sizeof folder - 1);
    folder_length = strlen(folder);
    chosen = which;
    error = number;
    calls = 0;
    mode = (enum mode)how;
}

/* Return how many calls there were. */
long faults_calls(void)
{
    return calls;
}

/* Return the name of a call, from 0 on. */
const char *faults_name(long number)
{
    return number < calls && number < MOST_CALLS ? names[number] : "";
}
