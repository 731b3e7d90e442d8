/* fastlb from plain C: a Python interpreter inside the program, and fastlb.Datapath inside that.
 *
 *     cc -o verdicts verdicts.c $(python3-config --embed --cflags --ldflags)
 *     PYTHONPATH=… ./verdicts fastlb.yaml 10.0.0.11=02:00:00:00:00:0b 198.51.100.7=02:00:00:00:00:07 < in.pcap
 *
 * Prints for each frame of a capture: verdict, reason, backend, and the frame that would be sent. Each becomes a Python
 * object; a loop that has no time for that goes over the pipeline itself, see ../embed. */
#include <Python.h>
#include <err.h>

enum { BATCH = 32, MAX_FRAME = 65535 + 18, PCAP_HEADER = 24 };

static PyObject *checked(PyObject *object) {
    if (object != NULL)
        return object;
    PyErr_Print();
    exit(1);
}

static PyObject *make_datapath(char **arguments) {
    PyObject *fastlb = checked(PyImport_ImportModule("fastlb"));
    PyObject *config = checked(PyObject_CallMethod(fastlb, "load_config", "s", *arguments));
    PyObject *datapath = checked(PyObject_CallMethod(fastlb, "Datapath", "O", config));
    Py_DECREF(config);
    Py_DECREF(fastlb);
    while (*++arguments != NULL) {
        char *mac = strchr(*arguments, '=');
        if (mac == NULL)
            errx(1, "%s: a neighbour is written ADDRESS=MAC", *arguments);
        *mac++ = '\0';
        Py_DECREF(checked(PyObject_CallMethod(datapath, "set_neighbour", "ss", *arguments, mac)));
    }
    return datapath;
}

static PyObject *read_batch(double *now) { /* a list of at most BATCH frames; `now`: seconds, of the last */
    struct { uint32_t seconds, microseconds, captured, length; } record;
    static char frame[MAX_FRAME];
    PyObject *frames = checked(PyList_New(0));
    while (PyList_GET_SIZE(frames) < BATCH && fread(&record, sizeof record, 1, stdin) == 1) {
        if (record.captured > sizeof frame || fread(frame, 1, record.captured, stdin) != record.captured)
            errx(1, "a frame is cut off, or too long");
        *now = record.seconds + record.microseconds / 1e6;
        PyObject *copy = checked(PyBytes_FromStringAndSize(frame, record.captured));
        PyList_Append(frames, copy);
        Py_DECREF(copy);
    }
    return frames;
}

static void print_result(PyObject *format, PyObject *result) {
    PyObject *text = checked(PyObject_CallMethod(format, "format", "O", result));
    PyObject *frames = checked(PyObject_GetAttrString(result, "frames"));
    printf("%s", PyUnicode_AsUTF8(text));
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(frames); i++)
        for (Py_ssize_t at = 0; at < PyBytes_GET_SIZE(PyList_GET_ITEM(frames, i)); at++)
            printf(at ? "%02x" : " %02x", (uint8_t)PyBytes_AS_STRING(PyList_GET_ITEM(frames, i))[at]);
    putchar('\n');
    Py_DECREF(frames);
    Py_DECREF(text);
}

int main(int count, char **arguments) {
    char header[PCAP_HEADER];
    double now = 0;
    if (count < 2 || fread(header, sizeof header, 1, stdin) != 1 || memcmp(header, "\xd4\xc3\xb2\xa1", 4) != 0)
        errx(1, "usage: verdicts CONFIG [ADDRESS=MAC ...] < CAPTURE (pcap, little-endian, microseconds)");
    Py_Initialize();
    PyObject *datapath = make_datapath(arguments + 1);
    PyObject *format = checked(PyUnicode_FromString("{0.verdict.name} {0.reason} {0.backend}"));
    for (PyObject *frames = read_batch(&now); PyList_GET_SIZE(frames) > 0; frames = read_batch(&now)) {
        PyObject *results = checked(PyObject_CallMethod(datapath, "process_batch", "Od", frames, now));
        for (Py_ssize_t i = 0; i < PyList_GET_SIZE(results); i++)
            print_result(format, PyList_GET_ITEM(results, i));
        Py_DECREF(results);
        Py_DECREF(frames);
    }
    return Py_FinalizeEx() < 0;
}
