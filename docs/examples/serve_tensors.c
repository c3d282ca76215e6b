/* A service in C: map a delta file with the second reader, verify it, and give tensors to programs on the same machine.
 *
 *     cc -std=c11 -O2 -Wall -Ispec/reader -o serve_tensors docs/examples/serve_tensors.c \
 *         spec/reader/deltafmt.c spec/reader/blake3.c spec/reader/xxh3.c -lpthread -ldl -lm
 *     ./serve_tensors FILE SOCKET
 *
 * SOCKET is the path of a socket that is made, for this user alone. A client sends the name of a tensor and a line
 * feed. The answer is a line, `ok DTYPE SIZES BYTES` or `error WHY`, and then as many bytes as it says: the delta as
 * float32, a run of rows at a time, or a tensor that is stored whole as it is. ask_tensor.py is such a client. A real
 * service would serve several clients at once; one dlt_file serves one thread at a time.
 */
#define _POSIX_C_SOURCE 200809L
#include "deltafmt.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

enum { LONGEST_NAME = 1024, RUN = 1 << 20 };

/* Write the rows of a tensor's delta, about RUN elements at a time. */
static dlt_status send_delta(FILE *client, dlt_file *file, const dlt_tensor *t, dlt_error *error) {
    uint64_t step = 1 + RUN / t->columns;
    float *rows = malloc((size_t)(step * t->columns) * sizeof *rows);
    dlt_status status = rows ? DLT_OK : DLT_SYSTEM;
    for (uint64_t at = 0; at < t->shared_rows && status == DLT_OK; at += step) {
        uint64_t count = t->shared_rows - at < step ? t->shared_rows - at : step;
        status = dlt_decode(file, t, at, count, rows, error);
        if (status == DLT_OK) fwrite(rows, sizeof *rows, (size_t)(count * t->columns), client);
    }
    free(rows);
    return status;
}

/* Answer one request. Returns 0 if the connection cannot go on, because bytes that were promised cannot follow. */
static int answer(FILE *client, dlt_file *file, const char *name) {
    dlt_error error;
    dlt_tensor asked, t;
    if (dlt_find(file, name, &asked, &error) || dlt_resolve(file, &asked, &t, &error) || dlt_load(file, &t, &error)) {
        fprintf(client, "error %s\n", error.message);
        return fflush(client) == 0;
    }
    int done = 1;
    if (t.action == DLT_SAME) {
        fprintf(client, "error it is the base's tensor\n");
    } else {
        int whole = t.action == DLT_REPLACE;
        uint64_t rows = t.rows, bytes = t.data.length;
        if (!whole) rows = t.shared_rows, bytes = rows * t.columns * sizeof(float);
        fprintf(client, "ok %s %llu,%llu %llu\n", whole ? dlt_dtype_name(t.dtype) : "F32", (unsigned long long)rows,
                (unsigned long long)t.columns, (unsigned long long)bytes);
        if (whole) fwrite(t.data.data, 1, (size_t)bytes, client);
        else done = send_delta(client, file, &t, &error) == DLT_OK;
    }
    dlt_unload(&t);
    return done && fflush(client) == 0;
}

static void serve(FILE *requests, FILE *answers, dlt_file *file) {
    char name[LONGEST_NAME + 2];
    while (fgets(name, sizeof name, requests)) {
        size_t length = strlen(name);
        if (length == 0 || name[length - 1] != '\n') break; /* longer than any name, or cut off */
        name[length - 1] = 0;
        if (!answer(answers, file, name)) break;
    }
}

int main(int count, char **arguments) {
    dlt_error error;
    dlt_file *file;
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (count != 3 || strlen(arguments[2]) >= sizeof address.sun_path) {
        return fprintf(stderr, "usage: serve_tensors FILE SOCKET\n"), 2;
    }
    if (dlt_open(arguments[1], NULL, &file, &error) || dlt_verify(file, &error)) {
        return fprintf(stderr, "serve_tensors: %s: %s\n", arguments[1], error.message), 3;
    }
    signal(SIGPIPE, SIG_IGN); /* a client that goes away ends its own connection alone */
    strcpy(address.sun_path, arguments[2]);
    umask(0177);
    int listening = socket(AF_UNIX, SOCK_STREAM, 0);
    if (listening < 0 || bind(listening, (struct sockaddr *)&address, sizeof address) || listen(listening, 8)) {
        return perror("serve_tensors"), 5;
    }
    printf("serving %zu tensors\n", dlt_about(file).tensors);
    fflush(stdout);
    for (;;) {
        int connection = accept(listening, NULL, NULL);
        if (connection < 0) continue;
        FILE *requests = fdopen(connection, "r"), *answers = fdopen(dup(connection), "w");
        if (requests && answers) serve(requests, answers, file);
        if (requests) fclose(requests);
        if (answers) fclose(answers);
    }
}
