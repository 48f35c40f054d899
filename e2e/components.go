package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The node's programs.

// startLimit is how long a component may take until it serves.
const startLimit = time.Minute

// component is one of the node's programs.
type component struct {
	cmd     *exec.Cmd
	log     string
	stopped atomic.Bool   // on purpose
	ended   chan struct{} // closed when the process has ended
}

// run starts a component that is one of the programs that buildTools built.
func (n *Node) run(name string, args ...string) *component {
	return n.supervise(name, exec.Command(filepath.Join(n.path("bin"), name), args...))
}

// supervise starts a component. Should it end without end having been called, the whole run fails: nothing
// that comes after would mean anything.
func (n *Node) supervise(name string, cmd *exec.Cmd) *component {
	c := &component{cmd: cmd, log: n.path(name + ".log"), ended: make(chan struct{})}
	log, err := os.OpenFile(c.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		c.fail(err)
	}
	defer log.Close()
	c.cmd.Stdout, c.cmd.Stderr = log, log
	if err := c.cmd.Start(); err != nil {
		c.fail(err)
	}
	go func() {
		err := c.cmd.Wait()
		if !c.stopped.Load() {
			c.fail(err)
		}
		close(c.ended)
	}()
	return c
}

// fail ends this process, and so the node, with the end of the component's log.
func (c *component) fail(err error) {
	log, _ := os.ReadFile(c.log)
	lines := strings.Split(strings.TrimSpace(string(log)), "\n")
	fmt.Fprintf(os.Stderr, "e2e: %s ended by itself: %v; its last lines:\n%s\n",
		filepath.Base(c.cmd.Path), err, strings.Join(lines[max(0, len(lines)-15):], "\n"))
	os.Exit(1)
}

// stop kills the component, as a crash would.
func (c *component) stop() { c.end(unix.SIGKILL) }

// end ends the component with a signal.
func (c *component) end(signal syscall.Signal) {
	c.stopped.Store(true)
	c.cmd.Process.Signal(signal)
	<-c.ended
}

// restart starts a stopped component again.
func (n *Node) restart(c *component) *component {
	return n.run(filepath.Base(c.cmd.Path), c.cmd.Args[1:]...)
}
