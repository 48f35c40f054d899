package tests

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"connectors-csi/e2e/machine"
)

// A whole run has two nodes, which share the machine's processors:
//
//   - On the first one are the tests that measure something. They come first, since their files' names do, and while one
//     of them runs nothing else does: even an idle node would take a third of a processor. The others follow.
//   - On the second one, which starts when those have ended, are those that stop components of the node; but for the
//     soak, with which the first one ends about when the second one does.

// onSecondNode are its tests, as flags of go test select tests.
const onSecondNode = "^(TestChangesArriveAfterFiveMinutesWithoutTheAPIServer|TestPodsKeepFiles.*|TestDeletedPodsLeaveNothing|" +
	"TestDriverIsListedOnlyWhileItServes|TestUpgradeAndRollback)$"

// envNode says which node of a whole run a process is for, "first" or "second".
const envNode = "E2E_NODE"

// measuringFile returns the named pipe that is there as long as tests that measure something are to come on the first
// node.
func measuringFile() (string, error) {
	cache, err := machine.CacheDir()
	return filepath.Join(cache, "measuring"), err
}

// endMeasuring says that none is to come any more, to startSecondNode, which reads the pipe.
var endMeasuring = sync.OnceValue(func() error {
	measuring, err := measuringFile()
	if err != nil || !machine.Exists(measuring) {
		return err
	}
	return errors.Join(os.WriteFile(measuring, nil, 0), os.Remove(measuring))
})

// startSecondNode makes this process one for the first node, and starts this program again for the second one when no
// test that measures is to come.
func startSecondNode() (wait func() error, _ error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	measuring, err := measuringFile()
	os.Remove(measuring) // which an interrupted run has left
	if err = errors.Join(err, unix.Mkfifo(measuring, 0o600)); err != nil {
		return nil, err
	}
	var printed bytes.Buffer
	cmd := exec.Command(self, append(os.Args[1:], "-test.run="+onSecondNode)...)
	cmd.Env, cmd.Stdout, cmd.Stderr = append(os.Environ(), envNode+"=second"), &printed, &printed
	os.Args = append(os.Args, "-test.skip="+onSecondNode)
	os.Setenv(envNode, "first")
	ended := make(chan error)
	go func() {
		runtime.LockOSThread() // the program ends with the thread that starts it
		os.ReadFile(measuring) // ends with endMeasuring
		ended <- cmd.Run()
	}()
	return func() error {
		err := errors.Join(endMeasuring(), <-ended) // if the first node has ended before
		fmt.Printf("On the second node:\n%s", printed.String())
		return err
	}, nil
}

// isWholeRun reports whether all tests are to run.
func isWholeRun() bool {
	for _, name := range []string{"test.run", "test.skip", "test.list"} {
		if flag.Lookup(name).Value.String() != "" {
			return false
		}
	}
	return true
}

// lock locks a file in the cache, shared or not, until it is closed or this process ends.
func lock(name string, how int) (*os.File, error) {
	cache, err := machine.CacheDir()
	if err != nil {
		return nil, err
	}
	file, err := os.OpenFile(filepath.Join(cache, name), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	return file, unix.Flock(int(file.Fd()), how)
}

// processors gives a test the machine's processors, shared with others or not, until it ends or calls release.
func processors(t *testing.T, how int) (release func()) {
	t.Helper()
	// Whoever waits for the second lock has the first one, so that nobody overtakes.
	turn, err := lock("processors.turn", unix.LOCK_EX)
	if err != nil {
		t.Fatal(err)
	}
	defer turn.Close()
	held, err := lock("processors", how)
	if err != nil {
		t.Fatal(err)
	}
	release = sync.OnceFunc(func() { held.Close() })
	t.Cleanup(release)
	return release
}

// measured is begin for a test that measures something.
func measured(t *testing.T, driverArgs ...string) namespace {
	t.Helper()
	measuring, err := measuringFile()
	if err != nil || os.Getenv(envNode) == "first" && !machine.Exists(measuring) {
		t.Fatal("the tests that measure come first: this one's file needs a name before those of the others", err)
	}
	processors(t, unix.LOCK_EX)
	installDriver(t, driverArgs...)
	return newNamespace(t)
}

// unmeasured is called at the beginning of a test that measures nothing.
func unmeasured(t *testing.T) (release func()) {
	t.Helper()
	if os.Getenv(envNode) == "first" {
		if err := endMeasuring(); err != nil {
			t.Fatal(err)
		}
	}
	return processors(t, unix.LOCK_SH)
}
