package node

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

// StartLimit is how long a component may take until it serves.
const StartLimit = time.Minute

// Component is one of the node's programs.
type Component struct {
	Cmd     *exec.Cmd
	Log     string
	stopped atomic.Bool   // on purpose
	ended   chan struct{} // closed when the process has ended
}

// Run starts a component that is one of the programs that linkTools links.
func (n *Node) Run(name string, args ...string) *Component {
	return n.Supervise(name, exec.Command(filepath.Join(n.Path("bin"), name), args...))
}

// Supervise starts a component. Should it end without end having been called, the whole run fails: nothing
// that comes after would mean anything.
func (n *Node) Supervise(name string, cmd *exec.Cmd) *Component {
	c := &Component{Cmd: cmd, Log: n.Path(name + ".log"), ended: make(chan struct{})}
	log, err := os.OpenFile(c.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		c.fail(err)
	}
	defer log.Close()
	c.Cmd.Stdout, c.Cmd.Stderr = log, log
	if err := c.Cmd.Start(); err != nil {
		c.fail(err)
	}
	go func() {
		err := c.Cmd.Wait()
		if !c.stopped.Load() {
			c.fail(err)
		}
		close(c.ended)
	}()
	return c
}

// fail ends this process, and so the node, with the end of the component's log.
func (c *Component) fail(err error) {
	log, _ := os.ReadFile(c.Log)
	lines := strings.Split(strings.TrimSpace(string(log)), "\n")
	fmt.Fprintf(os.Stderr, "e2e: %s ended by itself: %v; its last lines:\n%s\n",
		filepath.Base(c.Cmd.Path), err, strings.Join(lines[max(0, len(lines)-15):], "\n"))
	os.Exit(1)
}

// Stop kills the component, as a crash would.
func (c *Component) Stop() { c.End(unix.SIGKILL) }

// End ends the component with a signal.
func (c *Component) End(signal syscall.Signal) {
	c.stopped.Store(true)
	c.Cmd.Process.Signal(signal)
	<-c.ended
}

// Restart starts a stopped component again.
func (n *Node) Restart(c *Component) *Component {
	return n.Run(filepath.Base(c.Cmd.Path), c.Cmd.Args[1:]...)
}
