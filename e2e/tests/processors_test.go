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

// A whole run has two nodes, which share the machine's processors: on the second one are the tests that take minutes,
// and need the processors for little of them. What measures something begins with measured, and then nothing else runs.

// onSecondNode are those tests, as flags of go test select tests.
const onSecondNode = "^(TestChangesArriveAfterFiveMinutesWithoutTheAPIServer|TestSoakOfTwoMinutes|TestUpgradeAndRollback)$"

// startSecondNode starts this program again for the tests on the second node, and returns when that is ready. The first
// one is not to run them.
func startSecondNode() (wait func() error, _ error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(self, append(os.Args[1:], "-test.run="+onSecondNode)...)
	os.Args = append(os.Args, "-test.skip="+onSecondNode)
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

// processors gives a test the machine's processors, shared with others or not, until it ends or calls release.
func processors(t *testing.T, how int) (release func()) {
	t.Helper()
	cache, err := machine.CacheDir()
	if err != nil {
		t.Fatal(err)
	}
	lock := func(name string, how int) *os.File {
		file, err := os.OpenFile(filepath.Join(cache, name), os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Flock(int(file.Fd()), how); err != nil {
			t.Fatal(err)
		}
		return file
	}
	// Whoever waits for the second lock has the first one, so that nobody overtakes.
	turn := lock("processors.turn", unix.LOCK_EX)
	held := lock("processors", how)
	turn.Close()
	release = sync.OnceFunc(func() { held.Close() })
	t.Cleanup(release)
	return release
}

// measured is begin for a test that measures something.
func measured(t *testing.T, driverArgs ...string) namespace {
	t.Helper()
	processors(t, unix.LOCK_EX)
	installDriver(t, driverArgs...)
	return newNamespace(t)
}
