package tests

import (
	"bufio"
	"bytes"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"connectors-csi/e2e/machine"
)

// A whole run has two nodes, which share the machine's processors:
//
//   - On the first one are the tests that measure something. They come first, since their files' names do, and while one
//     of them runs nothing else does. The others follow.
//   - On the second one are those that stop components of the node. The first of them, in which the API server is away for
//     five minutes, sleeps for most of its time, beside the measurements; the others wait until those have ended.

// onSecondNode are its tests, as flags of go test select tests.
const onSecondNode = "^(TestChangesArriveAfterFiveMinutesWithoutTheAPIServer|TestPodsKeepFiles.*|TestDeletedPodsLeaveNothing|" +
	"TestDriverIsListedOnlyWhileItServes|TestSoakOfTwoMinutes|TestUpgradeAndRollback)$"

// envNode says which node of a whole run a process is for, "first" or "second".
const envNode = "E2E_NODE"

// startSecondNode starts this program again for the second node, and returns when that is ready. This process is for the
// first one from then on.
func startSecondNode() (wait func() error, _ error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(self, append(os.Args[1:], "-test.run="+onSecondNode)...)
	cmd.Env = append(os.Environ(), envNode+"=second")
	os.Args = append(os.Args, "-test.skip="+onSecondNode)
	os.Setenv(envNode, "first")
	runtime.LockOSThread() // it ends with the thread that starts it
	output, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	cmd.Stderr = cmd.Stdout
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	var printed bytes.Buffer
	ready, ended := make(chan bool), make(chan bool)
	go func() {
		defer close(ended)
		isReady := sync.OnceFunc(func() { close(ready) })
		defer isReady() // or it never will be
		for lines := bufio.NewScanner(output); lines.Scan(); {
			fmt.Fprintln(&printed, lines.Text())
			if strings.HasPrefix(lines.Text(), "A Kubernetes node is ready") {
				isReady()
			}
		}
	}()
	<-ready
	return func() error {
		<-ended
		err := cmd.Wait()
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

// measuring is the lock that the first node has as long as tests that measure something are to come.
var measuring *os.File

// startMeasuring is called before the first node's tests.
func startMeasuring() (err error) {
	if os.Getenv(envNode) == "first" {
		measuring, err = lock("measuring", unix.LOCK_EX)
	}
	return err
}

// measured is begin for a test that measures something.
func measured(t *testing.T, driverArgs ...string) namespace {
	t.Helper()
	if os.Getenv(envNode) == "first" && measuring == nil {
		t.Fatal("the tests that measure come first: this one's file needs a name before those of the others")
	}
	processors(t, unix.LOCK_EX)
	installDriver(t, driverArgs...)
	return newNamespace(t)
}

// endMeasuring says that no test that measures is to come on this node, and waits until none is on the other.
var endMeasuring = sync.OnceValue(func() error {
	switch os.Getenv(envNode) {
	case "first":
		measuring.Close()
		measuring = nil
	case "second":
		over, err := lock("measuring", unix.LOCK_SH)
		if err != nil {
			return err
		}
		over.Close()
	}
	return nil
})

// unmeasured is called at the beginning of a test that measures nothing.
func unmeasured(t *testing.T) (release func()) {
	t.Helper()
	if err := endMeasuring(); err != nil {
		t.Fatal(err)
	}
	return processors(t, unix.LOCK_SH)
}
