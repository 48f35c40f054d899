package scale

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	dto "github.com/prometheus/client_model/go"
)

// What the drivers and the API server use.

// usage is what all drivers have used until now.
func (s *scaleRun) usage() (all spent, err error) {
	all.requests = requests{}
	for _, node := range s.nodes {
		used, err := node.usage()
		if err != nil {
			return all, err
		}
		all.requests = all.requests.plus(used.requests)
		all.cpu += used.cpu
	}
	return all, nil
}

// usageOfAll is what all drivers have used until now, and the API server, with the reads that it counted.
func (s *scaleRun) usageOfAll() (drivers, server spent, err error) {
	if drivers, err = s.usage(); err != nil {
		return drivers, server, err
	}
	if server.cpu, err = processorTime(s.node.APIServer); err != nil {
		return drivers, server, err
	}
	families, err := s.serverMetrics()
	server.requests = requestsOf(families, "apiserver_request_total")
	return drivers, server, err
}

// serverMetrics are the API server's own.
func (s *scaleRun) serverMetrics() (map[string]*dto.MetricFamily, error) {
	text, err := s.client.RESTClient().Get().AbsPath("/metrics").DoRaw(context.Background())
	if err != nil {
		return nil, err
	}
	return parseMetrics(string(text))
}

// serverMemory is what the API server uses of its heap and for stacks, after a garbage collection.
func (s *scaleRun) serverMemory() (float64, error) {
	profile := s.client.RESTClient().Get().AbsPath("/debug/pprof/heap").Param("gc", "1")
	if _, err := profile.DoRaw(context.Background()); err != nil {
		return 0, err
	}
	families, err := s.serverMetrics()
	if err != nil {
		return 0, err
	}
	return families["go_memstats_heap_inuse_bytes"].Metric[0].GetGauge().GetValue() +
		families["go_memstats_stack_inuse_bytes"].Metric[0].GetGauge().GetValue(), nil
}

func perHour(cpu, of time.Duration) time.Duration {
	return time.Duration(float64(cpu) * float64(time.Hour) / float64(of))
}

// readPeaks takes the figures of the driver that has the highest of each.
func (s *scaleRun) readPeaks(f *figures) error {
	for _, node := range s.nodes {
		took, err := node.footprint()
		if err != nil {
			return err
		}
		d := &f.Driver
		d.PeakMiB, d.Threads, d.Descriptors = max(d.PeakMiB, took.PeakMiB), max(d.Threads, took.Threads), max(d.Descriptors, took.Descriptors)
	}
	return nil
}

// countGoroutines ends one driver for the figure that no metric has, and starts another in its place.
func (s *scaleRun) countGoroutines(f *figures) (err error) {
	if f.Driver.Goroutines, err = s.nodes[0].quit(); err != nil {
		return err
	}
	return s.nodes[0].start(s.node)
}

// requests are numbers of requests to the API server by verb and resource.
type requests map[string]float64

// requestsOf reads them from metrics, the driver's or the API server's; of the latter, only reads of the API group.
func requestsOf(families map[string]*dto.MetricFamily, name string) requests {
	r := requests{}
	for _, m := range families[name].GetMetric() {
		labels := map[string]string{}
		for _, pair := range m.Label {
			labels[pair.GetName()] = pair.GetValue()
		}
		verb := strings.ToLower(labels["verb"])
		if group, ok := labels["group"]; ok && (group != connectorResource.Group || verb != "get") {
			continue
		}
		r[strings.TrimSpace(verb+" "+labels["resource"])] += m.GetCounter().GetValue()
	}
	return r
}

func (r requests) plus(other requests) requests {
	sum := maps.Clone(r)
	for kind, number := range other {
		sum[kind] += number
	}
	return sum
}

// minus leaves out what is nothing.
func (r requests) minus(other requests) requests {
	rest := requests{}
	for kind, number := range r {
		if number != other[kind] {
			rest[kind] = number - other[kind]
		}
	}
	return rest
}

func (r requests) total() (sum float64) {
	for _, number := range r {
		sum += number
	}
	return sum
}

func (r requests) String() string {
	var kinds []string
	for _, kind := range slices.Sorted(maps.Keys(r)) {
		kinds = append(kinds, fmt.Sprintf("%.0f %s", r[kind], kind))
	}
	return cmp.Or(strings.Join(kinds, ", "), "none")
}
