package node

import (
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"connectors-csi/e2e/cluster"
)

// Services and their names, as a cluster has them: kube-proxy and CoreDNS.

// startServices starts both and returns when names of Services are resolved through the Service of the DNS.
func (n *Node) startServices() error {
	n.Run("kube-proxy",
		"--kubeconfig", n.Path("kube-proxy.kubeconfig"), "--proxy-mode", "nftables",
		"--hostname-override", Name, "--cluster-cidr", podNetwork,
		"--conntrack-max-per-core", "0", "--conntrack-min", "0") // the kernel's limits are not the namespace's to set
	if err := n.LeadTo("", ""); err != nil {
		return err
	}
	n.Run("coredns", "-conf", n.Path("Corefile"))
	if _, err := cluster.KubectlStdin(fmt.Sprintf(dnsServiceFormat, dnsServiceIP, IP), "apply", "-f", "-"); err != nil {
		return err
	}
	// This process's and its children's, in their own mount namespace.
	if err := unix.Mount(n.Path("resolv.conf"), "/etc/resolv.conf", "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("/etc/resolv.conf: %w", err)
	}
	return cluster.Await(StartLimit, func() error {
		conn, err := net.DialTimeout("tcp", dnsServiceIP+":53", time.Second)
		if err != nil {
			return fmt.Errorf("the DNS's Service: %w", err)
		}
		return conn.Close()
	})
}

// dnsServiceFormat is the Service that clusters have the DNS under. CoreDNS runs on the node itself, not in a Pod.
const dnsServiceFormat = `
apiVersion: v1
kind: Service
metadata: {name: kube-dns, namespace: kube-system}
spec:
  clusterIP: %s
  ports:
  - {name: dns, port: 53, protocol: UDP}
  - {name: dns-tcp, port: 53, protocol: TCP}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: kube-dns, namespace: kube-system, labels: {kubernetes.io/service-name: kube-dns}}
addressType: IPv4
endpoints: [{addresses: [%s]}]
ports:
- {name: dns, port: 53, protocol: UDP}
- {name: dns-tcp, port: 53, protocol: TCP}
`

// Names below example.com stand for the world outside, which LeadTo can change; there is nothing else.
const corefileFormat = `cluster.local in-addr.arpa {
    bind %[1]s
    errors
    kubernetes {
        kubeconfig %[2]s
        ttl 5
    }
}
example.com {
    bind %[1]s
    errors
    file %[3]s {
        reload 1s
    }
}
. {
    bind %[1]s
    errors
    template IN ANY {
        rcode NXDOMAIN
    }
}
`

// LeadTo makes a name below example.com lead to an address, within a second or two; without one all lead to targetIP.
func (n *Node) LeadTo(name, ip string) error {
	serial := time.Now().UnixMilli() / 100 % (1 << 31)
	zone := fmt.Sprintf("example.com. 1 IN SOA ns root %d 1 1 1 1\n*.example.com. 1 IN A %s\n", serial, targetIP)
	if name != "" {
		zone += fmt.Sprintf("%s. 1 IN A %s\n", name, ip)
	}
	return os.WriteFile(n.Path("zone"), []byte(zone), 0o644)
}
