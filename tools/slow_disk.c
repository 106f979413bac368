/* A slow disk: preloaded (LD_PRELOAD), it lets each fsync wait SLOW_DISK_SYNC_MS, and each write to a regular file
   SLOW_DISK_WRITE_MS. Used by tools/chaos.py --slow-disk. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static void wait_for(const char *setting) {
    const char *text = getenv(setting);
    long milliseconds = text ? atol(text) : 0;
    struct timespec left = {milliseconds / 1000, milliseconds % 1000 * 1000000};
    while (nanosleep(&left, &left) != 0) {
    }
}

int fsync(int file) {
    static int (*real)(int);
    if (!real) real = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
    wait_for("SLOW_DISK_SYNC_MS");
    return real(file);
}

ssize_t write(int file, const void *data, size_t size) {
    static ssize_t (*real)(int, const void *, size_t);
    struct stat status;
    if (!real) real = (ssize_t(*)(int, const void *, size_t))dlsym(RTLD_NEXT, "write");
    if (fstat(file, &status) == 0 && S_ISREG(status.st_mode)) wait_for("SLOW_DISK_WRITE_MS");
    return real(file, data, size);
}
